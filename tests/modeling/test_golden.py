"""Predictions against recorded outputs of the published implementations."""

import numpy as np
import pytest
import torch
from golden import FOLDER, detector, image, read
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import interpolate  # noqa: F401

from dimaskdino.modeling import ImageBatch, postprocess
"""placeholder"""

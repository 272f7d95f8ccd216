"""A student's session in a real browser: JupyterLab, a chapter, its explorer (needs playwright and a Chromium)."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from small import trained_file

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright for the browser test")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ROOT = Path(__file__).parent.parent.parent
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")]


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab server whose folder is tmp_path."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={tmp_path}"]
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(tmp_path / "config"), "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "lab.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api").close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait(20)
        log.close()


def test_click_into_the_sampling_explorer(lab, shapes_data, tmp_path):
    model = trained_file(tmp_path / "model.safetensors", shapes_data)
    chapter = nbformat.read(ROOT / "notebooks" / "02_deformable_attention.ipynb", as_version=4)
    parameters = next(c for c in chapter.cells if "parameters" in c.metadata.get("tags", []))
    parameters.source += f"\nmodel, images = {str(model)!r}, 2"
    # little enough for one screen: Lab renders what is in view
    chapter.cells = [*(c for c in chapter.cells if c.cell_type == "code")][:2] + [
        c for c in chapter.cells if c.source.startswith("explore_sampling")
    ]
    chapter.cells[1].source = chapter.cells[1].source.replace("os.chdir(project_root())", f"os.chdir({str(ROOT)!r})")
    nbformat.write(chapter, tmp_path / "chapter.ipynb")
    pictures = Path(os.environ.get("SCREENSHOTS", tmp_path))
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1500, "height": 1300})
        page.goto(f"{lab}/lab/tree/chapter.ipynb")
        page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
        page.get_by_text("| Idle").wait_for(timeout=60_000)  # the kernel is up, and with it the widgets' channel
        page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
        image = page.locator("img[alt^='Sampling points of query']")
        try:
            image.wait_for(timeout=60_000)
        finally:
            page.screenshot(path=pictures / "explorer.png")
        image.scroll_into_view_if_needed()
        before = image.get_attribute("alt")
        page.screenshot(path=pictures / "explorer_before.png")
        box = image.bounding_box()
        for across, down in ((0.05, 0.2), (0.2, 0.2), (0.05, 0.7), (0.2, 0.7)):  # corners of the finest level's panel
            page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
            page.wait_for_timeout(1000)
            if image.get_attribute("alt") != before:
                break
        assert image.get_attribute("alt") != before
        page.screenshot(path=pictures / "explorer_after.png")
        slider = page.get_by_role("slider").first
        slider.focus()
        clicked = image.get_attribute("alt")
        slider.press("ArrowRight")
        page.wait_for_function(
            "before => document.querySelector(\"img[alt^='Sampling points of query']\").alt !== before",
            arg=clicked,
            timeout=20_000,
        )
        browser.close()

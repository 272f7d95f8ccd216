"""Sphinx's settings for the course as a site; `python -m dimaskdino.course.site` uses them."""

project = "DI-MaskDINO"
extensions = ["myst_nb"]
html_theme = "sphinx_book_theme"
html_title = "DI-MaskDINO: the course"
html_theme_options = {"show_navbar_depth": 1, "show_toc_level": 2, "use_download_button": True}
nb_execution_mode = "off"  # they were executed before
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.xref_missing"]  # links to files of the repository that are no pages

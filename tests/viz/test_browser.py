"""A student's session in a real browser, with JupyterLab (needs playwright and a Chromium).

SCREENSHOTS=FOLDER keeps what was seen.
"""

import json
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


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address and folder of a JupyterLab server."""
    folder = tmp_path_factory.mktemp("lab")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    # all cells of a chapter stay in the page, in view or not
    settings = folder / "config" / "labconfig" / "default_setting_overrides.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}))
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(folder / "config"), "PYTHONPATH": str(ROOT)}
    log = (folder / "lab.log").open("w")
    server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/api").close()
                break
            except OSError:
                time.sleep(0.5)
        yield address, folder
    finally:
        server.terminate()
        server.wait(20)
        log.close()


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        running = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


def click_into_the_finest_level(page, image):
    """Click at corners of the first panel: the query nearest to one of them is not the one shown."""
    before, box = image.get_attribute("alt"), image.bounding_box()
    for across, down in ((0.05, 0.2), (0.2, 0.2), (0.05, 0.7), (0.2, 0.7)):
        page.mouse.click(box["x"] + across * box["width"], box["y"] + down * box["height"])
        page.wait_for_timeout(1000)
        if image.get_attribute("alt") != before:
            return
    raise AssertionError("no click chose another query")


@pytest.mark.parametrize("chapter", ["01_imbalance", "03_deformable_attention", "05_bato"])
def test_a_whole_chapter_is_clicked_through(chapter, lab, browser, shapes_data):
    """A student runs all cells, answers every question, sees the answers, and moves every explorer."""
    address, folder = lab
    model = trained_file(folder / "model.safetensors", shapes_data)
    notebook = nbformat.read(ROOT / "notebooks" / "solutions" / f"{chapter}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    values = "\n".join(f"{name} = {str(model)!r}" for name in ("model", "baseline") if f"{name}: str" in code[0].source)
    code[0].source = f"import os\nos.chdir({str(ROOT)!r})\n{code[0].source}\n{values}\nimages = 2"
    for cell in code:
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / f"{chapter}.ipynb")
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.goto(f"{address}/lab/tree/{chapter}.ipynb?reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=60_000)
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    page.wait_for_function(
        """() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(
            (prompt) => /^\\[\\d+\\]:$/.test(prompt.innerText.trim()))""",
        timeout=300_000,
    )
    for text in page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts():
        assert all("/s" in line for line in text.strip().splitlines())  # a finished progress bar each
    committing = page.get_by_role("button", name="That is my answer")
    questions = committing.count()
    assert questions >= 1
    for number in range(questions):
        box = committing.nth(number).locator("xpath=ancestor::*[contains(@class, 'jp-OutputArea-output')][1]")
        if box.locator("input[type=radio]").count():
            box.locator("input[type=radio]").first.check()
        committing.nth(number).click()
    explorers = page.locator(
        ".jp-OutputArea-output:has(select):has(img[alt]), .jp-OutputArea-output:has([role=slider]):has(img[alt])"
    )
    assert explorers.count() >= 1
    for number in range(explorers.count()):
        explorer = explorers.nth(number)
        image = explorer.locator("img[alt]").last
        before = image.get_attribute("alt")
        if explorer.locator("[role=slider]").count():
            explorer.locator("[role=slider]").first.press("ArrowRight")
        else:
            control = explorer.locator("select").last
            count, chosen = control.evaluate("x => [x.options.length, x.selectedIndex]")
            control.select_option(index=(chosen + 1) % count)
        for _ in range(50):
            if image.get_attribute("alt") != before:
                break
            page.wait_for_timeout(200)
        assert image.get_attribute("alt") != before
        if chapter == "03_deformable_attention":
            click_into_the_finest_level(page, image)
    page.screenshot(path=Path(os.environ.get("SCREENSHOTS", folder)) / f"chapter_{chapter}.png")
    page.close()


def test_a_term_leads_to_the_glossary(lab, browser):
    """The link opens chapter 0, at its glossary where the chapter is open already: JupyterLab scrolls no other."""
    address, folder = lab
    for chapter in ("00_detr", "04_de_imbalance"):
        shutil.copy(ROOT / "notebooks" / f"{chapter}.ipynb", folder / f"{chapter}.ipynb")
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.goto(f"{address}/lab/tree/04_de_imbalance.ipynb?reset")
    link, glossary = page.get_by_role("link", name="feature tokens").first, page.locator("h2[data-jupyter-id=Glossary]")
    link.click(timeout=60_000)
    glossary.wait_for(timeout=60_000)
    page.locator(".lm-TabBar-tabLabel", has_text="04_de").click()
    link.click()
    page.wait_for_function(
        "() => document.querySelector('h2[data-jupyter-id=Glossary]').getBoundingClientRect().top < 1000",
        timeout=20_000,
    )
    page.screenshot(path=Path(os.environ.get("SCREENSHOTS", folder)) / "glossary.png")
    page.close()

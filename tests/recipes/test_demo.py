"""The demo's page, through its API and in a real headless browser (where gradio, playwright and Chromium are installed)."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from PIL import Image

from tests.recipes.conftest import ROOT

pytest.importorskip("gradio")
CAPTION = "a handwritten seven"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def page(untrained):
    """The address of a page with an untrained tri-modal model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GRADIO_ANALYTICS_ENABLED": "False"}
    env.pop("MDM_TYPECHECK", None)
    command = [sys.executable, "-m", "mdm.cli", "demo", f"checkpoint={untrained}", f"port={port}", "device=cpu"]
    command.append(f"captions={{text_to_image: {CAPTION}}}")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=1).read()
                break
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.5)
        yield address
    finally:
        process.kill()


def test_the_unmasking_streams_over_the_api(page):
    """Every pass is a message: all masked at first, nothing masked at the end, then the images."""
    from gradio_client import Client

    client = Client(page, verbose=False)
    job = client.submit("a seven", "first-hitting (one token a pass)", 8, 1.0, 0.9, 0.5, 2, 0, api_name="/go-text_to_image")
    job.result(timeout=60)
    pages = [out[0] for out in job.outputs()]
    assert 'class="masked"' in pages[0]
    assert "Pass 0" in pages[0]
    assert "confidence" in pages[-1]
    assert "Done in 16 passes (16.0 a sample)" in pages[-1]
    assert 'class="masked"' not in pages[-1]
    assert len(job.outputs()[-1][1]) == 2  # the gallery


def test_the_page_opens_on_a_picture_with_its_caption_and_can_be_replayed(page):
    """What runs when it is opened is the first tab; its passes can be stepped through afterwards, in the same session."""
    from gradio_client import Client

    client = Client(page, verbose=False)
    settings = ("as tuned for this task", 5, 1.0, 0.95, 0.25, 4, 0)
    job = client.submit(CAPTION, *settings, api_name="/open-go-text_to_image")
    job.result(timeout=60)
    assert "Done in 5 passes (5.0 a sample)" in job.outputs()[-1][0]  # the slider moves the tuned sampler, too
    assert len(job.outputs()[-1][1]) == 4
    stepped = client.predict(2, api_name="/pass-go-text_to_image")
    assert "Pass 2 of 5" in stepped
    assert 'class="masked"' in stepped
    greedy = client.predict(CAPTION, "confidence", 4, 0.0, 1.0, 0.0, 4, 0, api_name="/go-text_to_image")
    assert "It is sampled greedily" in greedy[0]
    assert len(greedy[1]) == 1


def test_one_request_cannot_ask_for_everything(page):
    from gradio_client import Client
    from gradio_client.exceptions import AppError

    client = Client(page, verbose=False)
    for caption, count in (("a seven", 1000), ("x" * 3000, 2)):
        with pytest.raises(AppError, match=r"must be in 1\.\.8|less than|maximum|at most 2000 characters"):
            client.predict(caption, "ancestral", 8, 1.0, 0.9, 0.5, count, 0, api_name="/go-text_to_image")


def test_an_upload_is_read_as_every_other_file_is(page, tmp_path):
    """A picture of another shape and mode is edited; what cannot be read is said in a line."""
    from gradio_client import Client, handle_file

    Image.new("RGBA", (30, 20)).save(tmp_path / "nothing.png")
    (tmp_path / "no.wav").write_bytes(b"RIFFgarbage")
    client = Client(page, verbose=False)
    settings = ("first-hitting (one token a pass)", 8, 1.0, 0.9, 0.5, 1, 0)
    picture = handle_file(tmp_path / "nothing.png")
    made = client.predict("a seven", picture, "0,4,8,8", *settings, api_name="/go-text_to_image-edit")
    assert "Done in" in made[0]
    with pytest.raises(Exception, match="audio: it cannot be read as audio: Format not recognised"):
        client.predict("a seven", handle_file(tmp_path / "no.wav"), "0-", *settings, api_name="/go-text_to_speech-edit")
    with pytest.raises(Exception, match=r"region .*7.*: left,top,right,bottom in pixels, inside 0\.\.8"):
        client.predict("a seven", picture, "7", *settings, api_name="/go-text_to_image-edit")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_user_generates_and_edits_in_a_browser(page):
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        view = browser.new_page(viewport={"width": 1200, "height": 900})
        errors = []
        view.on("pageerror", lambda error: errors.append(str(error)))
        view.goto(page, wait_until="domcontentloaded", timeout=60_000)
        for tab, task in (("Text to image", "text_to_image"), ("Text to speech", "text_to_speech"), ("Text", "text")):
            view.get_by_role("tab", name=tab, exact=True).click(timeout=60_000)
            if task != "text_to_image":  # that has been made as the page was opened
                view.locator(f"#go-{task}").click()
            shown = view.locator(".live:visible")
            shown.get_by_text("Done in").wait_for(timeout=60_000)
            assert shown.locator("[title^='confidence']").count() > 0
            assert shown.locator(".masked").count() == 0
            passes = view.locator(".replay:visible input[type=number]")
            passes.fill("0")
            passes.press("Enter")
            shown.get_by_text("Pass 0 of").wait_for(timeout=60_000)
            assert shown.locator(".masked").count() > 0
        view.get_by_role("tab", name="Editing", exact=True).click()
        view.locator("#go-text-edit").click()
        view.locator(".live:visible").get_by_text("Done in").wait_for(timeout=60_000)
        assert view.locator(".live:visible [title='given']").count() > 0
        view.get_by_role("tab", name="Part of the image").click()
        view.locator("[data-testid='image']:visible").first.wait_for(timeout=30_000)  # a picture is brought as one
        view.locator("#go-text_to_image-edit").click()
        view.get_by_text("choose a file first: image").first.wait_for(timeout=30_000)
        assert not errors
        browser.close()


def test_a_port_in_use_is_one_line(untrained, run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = run("demo", f"checkpoint={untrained}", f"port={taken.getsockname()[1]}", check=False)
    assert done.returncode == 2
    assert "cannot be listened to" in done.stderr

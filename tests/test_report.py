"""The report page: what is written, and how it behaves in a browser."""

from __future__ import annotations

import base64
import io
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from helpers.models import OBLIQUE, make_model
from helpers.volumes import noise, write_volume
from sslfast import UserError
from sslfast.report import main
from sslfast.report_page import PAGE, SIDE, ReportCase, colour, planes_of, write_report
from sslfast.training.checkpoint import save_checkpoint

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
CLASSES = {0: "background", 5: "liver", 7: "spleen <b>"}
VIEWS = {
    "light": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    "phone": {"viewport": {"width": 360, "height": 740}, "color_scheme": "light"},
}


def write_case(folder: Path, name: str, **more: Any) -> ReportCase:
    """A scan with a liver and a spleen, its segmentation, reference and disagreement."""
    label = np.zeros((24, 20, 16), np.uint8)
    label[4:12, 5:15, 4:12] = 5
    label[15:20, 8:12, 6:10] = 7
    moved = np.roll(label, 1, 0)
    differ = (label != moved).astype(np.float32)
    paths = [
        write_volume(folder / kind / f"{name}.nii.gz", array, OBLIQUE)
        for kind, array in (
            ("images", noise(24, 20, 16) + label),
            ("out", moved),
            ("labels", label),
            ("differ", differ),
        )
    ]
    return ReportCase(name, [paths[0]], *paths[1:], **more)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Three cases, of which two have pictures."""
    rows = {
        "a": {"agreement": 0.95, "estimated_dice": 0.9, "dice_low": 0.85, "dice_high": 0.94, "flag": ""},
        "b": {"agreement": 0.7, "estimated_dice": 0.6, "dice_low": 0.5, "dice_high": 0.7, "flag": ""},
        "</script>": {"agreement": 0.99, "flag": "liver <i>not</i> found"},
    }
    names = ("a", "b", "</script>")
    cases = [write_case(tmp_path, f"case{i}", row=rows[name], dice=0.9 - i / 10) for i, name in enumerate(names)]
    cases = [ReportCase(name, *list(vars(case).values())[1:]) for name, case in zip(names, cases)]
    return write_report(tmp_path / PAGE, "A <b>title</b>", cases, CLASSES, limit=2, texts={"config.yaml": "steps: 2"})


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    if BROWSER is None:
        pytest.skip("there is no Chromium; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def tab(browser: Any, page: Path) -> Iterator[Any]:
    """The page in a tab; in the end, its console is empty and it has asked for nothing."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    tab.wait_for_selector("canvas")
    yield tab
    context.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


def pixels(tab: Any) -> list[list[int]]:
    """The pixels of each plane."""
    script = """all => all.map(c => [...c.getContext("2d").getImageData(0, 0, c.width, c.height).data])"""
    return tab.eval_on_selector_all("canvas", script)


def order(tab: Any) -> list[str]:
    return tab.eval_on_selector_all("#cases tbody tr td:first-child", "cells => cells.map(c => c.textContent)")


def shown_case(tab: Any) -> str:
    return tab.text_content("#case-name")


def test_cases_that_need_a_look_come_first_and_nothing_is_markup(tab: Any) -> None:
    assert tab.title() == "A <b>title</b>"
    assert order(tab) == ["</script>", "b", "a"]
    assert shown_case(tab) == "</script>"
    assert "liver <i>not</i> found" in tab.text_content("#case-facts")
    assert tab.locator("#classes label").all_text_contents() == ["liver", "spleen <b>"]
    assert tab.text_content("#texts pre") == "steps: 2"


def test_a_slider_moves_through_the_slices_by_keys(tab: Any) -> None:
    slider = tab.locator("input[type=range]").first
    before, place = pixels(tab), tab.text_content("figcaption span:last-child")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    after = pixels(tab)
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    assert tab.text_content("figcaption span:last-child") != place
    assert slider.get_attribute("aria-valuetext") == tab.text_content("figcaption span:last-child")


@pytest.mark.parametrize("layer", ["prediction", "reference", "disagreement"])
def test_each_overlay_has_a_switch_and_a_key(tab: Any, layer: str) -> None:
    before = pixels(tab)
    tab.uncheck(f"#layer-{layer}")
    without = pixels(tab)
    assert without[0] != before[0]
    tab.keyboard.press(str(1 + ["prediction", "reference", "disagreement"].index(layer)))
    assert pixels(tab) == before


def test_without_overlays_the_picture_is_grey_and_each_class_has_a_switch(tab: Any) -> None:
    with_both = pixels(tab)[0]
    tab.uncheck("#class-2")
    assert pixels(tab)[0] != with_both
    tab.check("#class-2")
    assert pixels(tab)[0] == with_both
    for layer in ("prediction", "reference", "disagreement"):
        tab.uncheck(f"#layer-{layer}")
    values = np.array(pixels(tab)[0]).reshape(-1, 4)
    assert (values[:, 0] == values[:, 1]).all()
    assert (values[:, 1] == values[:, 2]).all()


def test_columns_sort_both_ways_with_empty_cells_last(tab: Any) -> None:
    head = tab.locator("th button", has_text="estimated dice")
    head.click()
    assert order(tab) == ["b", "a", "</script>"]
    assert tab.get_attribute("th[aria-sort]", "aria-sort") == "ascending"
    head.press("Enter")
    assert order(tab) == ["a", "b", "</script>"]
    tab.locator("th button", has_text="case").click()
    assert order(tab) == ["</script>", "a", "b"]


def test_cases_are_chosen_by_click_and_by_key(tab: Any) -> None:
    tab.locator("td button", has_text="b").click()
    tab.wait_for_selector("#cases tr[data-index='1'][aria-current=true]")
    assert shown_case(tab) == "b"
    tab.keyboard.press("n")
    assert shown_case(tab) == "a"
    tab.wait_for_selector("#planes :text('no pictures here')")
    tab.keyboard.press("p")
    tab.locator("canvas").nth(2).wait_for()
    assert tab.get_attribute("#cases tr[aria-current=true]", "data-index") == "1"


@pytest.mark.parametrize("view", VIEWS)
def test_it_is_readable_in_dark_and_light_and_on_a_phone(browser: Any, page: Path, view: str) -> None:
    context = browser.new_context(**VIEWS[view])
    tab = context.new_page()
    tab.goto(page.as_uri())
    tab.wait_for_selector("canvas")
    ink, paper = tab.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    bright = [sum(map(int, colour[4:-1].split(","))) / 765 for colour in (ink, paper)]
    assert abs(bright[0] - bright[1]) > 0.7
    assert (bright[1] < 0.5) == (view == "dark")
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("Math.min(...[...document.querySelectorAll('canvas')].map(c => c.clientWidth))") > 250
    context.close()


def test_planes_are_drawn_as_radiologists_do(tmp_path: Path) -> None:
    case = write_case(tmp_path, "case")
    planes = {plane["name"]: plane for plane in planes_of(case, [5, 7])}
    assert [planes[name]["sides"] for name in ("axial", "coronal", "sagittal")] == ["RLAP", "RLSI", "APSI"]
    assert all(max(plane["width"], plane["height"]) <= SIDE for plane in planes.values())
    affine = nib.load(case.segmentation).affine
    upright = nib.orientations.apply_orientation(
        np.asarray(nib.load(case.segmentation).dataobj), nib.orientations.io_orientation(affine)
    )
    axial = planes["axial"]
    middle = axial["slices"][axial["start"]]
    expected = (upright[::-1, ::-1, middle].T == 5).astype(int) + 2 * (upright[::-1, ::-1, middle].T == 7)
    assert np.array_equal(decoded(axial["maps"])[axial["start"] * axial["height"] :][: axial["height"], :, 0], expected)


def decoded(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))))


def test_colours_differ() -> None:
    assert len({tuple(colour(i)) for i in range(31)}) == 31


def test_the_command_writes_the_page_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        write_case(tmp_path, name)
    flags = [str(tmp_path / "out"), "--images", str(tmp_path / "images")]
    assert main([*flags, "--labels", str(tmp_path / "labels")]) == 0
    assert capsys.readouterr().out.strip().endswith(str(tmp_path / "out" / PAGE))
    text = (tmp_path / "out" / PAGE).read_text()
    content = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [case["name"] for case in content["cases"]] == ["a", "b"]
    assert [c["name"] for c in content["classes"]] == ["class 5", "class 7"]
    assert 0.5 < content["cases"][0]["cells"][1] < 1
    assert main([*flags, "--cases", "1"]) == 0  # a page of ours is replaced
    (tmp_path / "out" / PAGE).write_text("mine")
    assert main(flags) == 2
    assert "is not a report of sslfast, and would be replaced" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["out"], "out is no run, for it has no config.yaml; add --images DIR, what was segmented"),
        (["out", "--images", "other"], "has no segmentation <case>.nii.gz of these volumes"),
        (
            ["run"],
            "Correct it there if the volumes have moved",
        ),
        (["run", "--images", "images"], "run is a run, which knows its volumes; leave out --images"),
    ],
)
def test_what_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    write_case(tmp_path, "a")
    write_volume(tmp_path / "other" / "z.nii.gz", noise(9, 9, 9))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("data: gone\n")
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    assert message in capsys.readouterr().err


def test_order_is_by_flag_then_by_what_is_known() -> None:
    def case(**row: Any) -> ReportCase:
        return ReportCase("x", [], Path(), row=row, dice=row.pop("dice", math.nan))

    cases = [case(agreement=0.5), case(agreement=0.4, estimated_dice=0.6), case(flag="odd"), case(dice=0.3), case()]
    assert [cases.index(one) for one in sorted(cases, key=lambda one: one.trust)] == [2, 3, 0, 1, 4]


def test_a_page_that_is_not_ours_is_kept(tmp_path: Path) -> None:
    (tmp_path / PAGE).write_text("<html>")
    with pytest.raises(UserError, match="move it away"):
        write_report(tmp_path / PAGE, "x", [], CLASSES, limit=1)


def test_references_are_compared_as_by_evaluate(tmp_path: Path) -> None:
    """Other order of the axes, merged values, voxels that are not annotated."""
    array = np.zeros((12, 10, 8), np.uint8)
    array[2:6, 2:6, 2:6] = 1
    affine = np.diag([1.0, 1, 1, 1])
    write_volume(tmp_path / "images" / "a.nii.gz", noise(12, 10, 8), affine)
    write_volume(tmp_path / "out" / "a.nii.gz", array, affine)
    reference = np.where(np.arange(8) == 3, 255, array)
    reference[4:6][reference[4:6] == 1] = 2
    turned = nib.Nifti1Image(reference.astype(np.uint8), affine).as_reoriented(np.array([[0, -1], [2, 1], [1, 1]]))
    (tmp_path / "labels").mkdir()
    nib.save(turned, tmp_path / "labels" / "a.nii.gz")
    (tmp_path / "labels" / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "x": 1, "ignore": 255}}))
    model = replace(make_model(), merged={2: 1})
    save_checkpoint(tmp_path / "model.pt", {"model": model.state()})
    flags = [str(tmp_path / "out"), "--images", str(tmp_path / "images"), "--labels", str(tmp_path / "labels")]
    assert main([*flags, "--checkpoint", str(tmp_path / "model.pt")]) == 0
    text = (tmp_path / "out" / PAGE).read_text()
    (case,) = json.loads(text.split('id="data">')[1].split("</script>")[0])["cases"]
    maps = decoded(case["planes"][0]["maps"])
    annotated = maps[..., 1] > 0
    assert case["cells"][1] == 1
    assert np.array_equal(maps[..., 0][annotated], maps[..., 1][annotated])


def test_a_case_that_cannot_be_read_says_so_and_the_others_are_shown(tmp_path: Path) -> None:
    good, bad = (write_case(tmp_path, name) for name in ("good", "bad"))
    bad.images[0].write_bytes(b"broken")
    write_report(tmp_path / PAGE, "x", [good, bad], CLASSES, limit=9)
    content = json.loads((tmp_path / PAGE).read_text().split('id="data">')[1].split("</script>")[0])
    by_name = {case["name"]: case for case in content["cases"]}
    assert len(by_name["good"]["planes"]) == 3
    assert "bad.nii.gz cannot be read" in by_name["bad"]["failed"]

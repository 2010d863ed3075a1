"""The page: everything in one file, whatever the result holds; and how it looks to a browser."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from maskwright.errors import DataError
from maskwright.evaluation import Evaluator, Result, Speed, report
from maskwright.evaluation.charts import chart
from maskwright.structures import Instances
from tests.evaluation import browser
from tests.evaluation.ellipses import Ellipses, data_set, predictions

EVIL = '<script>alert("class")</script>'


def result_of(data=None, made=None, **options):
    data = data or data_set(12)
    evaluator = Evaluator(data, boundary=True)
    for image_id, instances in zip(data.image_ids(), made or predictions(data), strict=True):
        evaluator.add(image_id, instances)
    return evaluator.result(**options)


def run_folder(folder, result=None):
    folder.mkdir(exist_ok=True)
    with (folder / "log.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["step", "epoch", "name", "value"])
        for step in range(1, 901):
            for name, share in (("loss", 1.0), ("loss_mask", 0.6), ("loss_class", 0.4)):
                rows.writerow([step, step // 100, f"train/{name}", share * 3 / step**0.5])
            rows.writerow([step, step // 100, "lr", 0.02])
            if step % 100 == 0:
                rows.writerow([step, step // 100, "val/loss", 3 / step**0.4])
                rows.writerow([step, step // 100, "val/segm/AP", 0.4 - 30 / (step + 100)])
    (folder / "recipe.json").write_text(json.dumps({"lr": 0.02, "augment": {"mirror": 0.5}, "ema": None}))
    if result:
        result.save(folder / "result.json")
    return folder


class Reader(HTMLParser):
    """Collects what a page is made of, and complains where it is not nested properly."""

    VOID = frozenset({"meta", "link", "img", "br", "line", "circle", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.links, self.sources, self.text = [], [], set(), [], [], ""
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in values:
            assert values["id"] not in self.ids, f"two elements are called {values['id']}"
            self.ids.add(values["id"])
        self.links += [values["href"]] if tag == "a" else []
        self.sources += [v for k, v in values.items() if k in ("src", "href", "srcset", "data") and tag != "a"]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open, f"</{tag}> closes nothing"
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(path):
    page = Reader(path.read_text("utf-8"))
    assert "script" not in page.tags
    assert all(source.startswith("data:") for source in page.sources), "the page refers to something outside itself"
    inside = [link[1:] for link in page.links if link.startswith("#")]
    assert len(inside) == len(page.links)
    assert set(inside) <= page.ids, "a link leads nowhere"
    assert not re.search(r"url\(|@import|https?://", path.read_text("utf-8"))
    return page


@pytest.mark.fast
def test_numbers_at_an_axis_are_short_enough_for_their_place():
    told = re.findall(r'text-anchor="end">([^<]*)</text>', chart({"rate": ([0, 1], [0.0, 6e-4])}))
    assert told[:4] == ["0", "2e-4", "4e-4", "6e-4"]
    for high in (1e-9, 3e-5, 7e-4, 0.012, 3.0, 950.0, 123_456.0, 9e7):
        told = re.findall(r'text-anchor="end">([^<]*)</text>', chart({"": ([0, 1], [-high, high])}))
        assert max(map(len, told)) <= 6


@pytest.mark.parametrize(
    ("value", "percent", "shown"),
    [
        (0.5, False, "0.500"), (0.75, False, "0.750"), (0.123456, False, "0.123"), (0, False, "0.00"),
        (-2, False, "-2.00"), (12.34, False, "12.3"), (999.7, False, "1.00 k"), (123.4, False, "123"),
        (12_345, False, "12.3 k"), (2e6, False, "2.00 M"), (6e-4, False, "6.00e-4"), (5e9, False, "5.00e9"),
        (0.5, True, "50.0"), (0.12345, True, "12.3"), (1, True, "100"), (0.04, True, "4.00"),
    ],
)  # fmt: skip
def test_figures_of_the_legend_have_three_digits(value, percent, shown):
    assert f"<b>{shown}</b>" in chart({"line": ([0, 1], [1, value])}, percent=percent)


def test_a_run_folder_gives_a_page_with_all_its_parts(tmp_path):
    result = result_of()
    result.speed = Speed(milliseconds=41.5, peak_memory=300 << 20)
    result.protocol.device = "CPU, 2 threads"
    path = report(run_folder(tmp_path / "first run", result))
    assert path == tmp_path / "first run" / "report.html"
    page = read(path)
    assert {"training", "numbers", "sizes", "classes", "confusion", "images", "speed", "recipe"} <= page.ids
    for said in (
        "first run",
        f"{100 * result['segm/AP']:.1f}",
        "CPU, 2 threads",
        "41.5 ms",
        "300 MiB",
        "augment.mirror",
    ):
        assert said in page.text
    assert page.tags.count("img") == 2 * len(result.examples) > 4
    assert page.text.count("Learning rate") == 1
    assert page.tags.count("svg") == 4 + 3  # loss, AP, terms, learning rate; precision over recall for each kind


def test_a_bare_result_gives_a_page_where_it_is_told_to(tmp_path):
    path = report(result_of(title="Discs & eggs"), tmp_path / "deep" / "page.html")
    page = read(path)
    assert "Discs & eggs" in page.text
    assert "training" not in page.ids
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]  # nothing half-written beside it


def test_a_saved_result_gives_the_same_page(tmp_path):
    result = result_of()
    saved = result.save(tmp_path / "result.json")
    direct, again = report(result, tmp_path / "a.html", title="x"), report(saved, tmp_path / "b.html", title="x")
    assert direct.read_text("utf-8") == again.read_text("utf-8")


def test_a_run_without_a_result_shows_its_curves(tmp_path):
    page = read(report(run_folder(tmp_path / "run")))
    assert "has no result.json." in page.text
    assert page.tags.count("svg") == 4


def test_nothing_predicted_nothing_to_find_and_no_images_at_all(tmp_path):
    data = data_set(5)
    nothing = [Instances.empty(size) for size in data.sizes()]
    bare = Ellipses([t[:0] for t in data.images], data.ids)
    for number, (truth, made) in enumerate([(data, nothing), (bare, predictions(data)), (bare, nothing)]):
        page = read(report(result_of(truth, made), tmp_path / f"{number}.html"))
        assert "0.0" in page.text if truth is data else "–" in page.text
    assert "There are no objects and no predictions" in page.text
    read(report(result_of(Ellipses([], []), []), tmp_path / "none.html"))
    read(report(Result(summary={}, classes=()), tmp_path / "bare.html"))


def test_names_from_files_cannot_become_part_of_the_page(tmp_path):
    data = data_set(12)
    evil = Ellipses(data.images, [f"{EVIL} {i:02}" for i in range(12)], (EVIL, "egg", "'\"><img src=x>"), name=EVIL)
    path = report(result_of(evil, predictions(data), title=EVIL), tmp_path / "page.html")
    page = read(path)
    assert EVIL in page.text
    assert EVIL not in path.read_text("utf-8")
    assert page.tags.count("img") == 12 * 2


def test_many_classes_are_cut_to_those_with_most_errors(tmp_path):
    data = data_set(30, classes=60)
    many = Ellipses(data.images, data.ids, tuple(f"class {i}" for i in range(60)), tuple(range(60)))
    page = read(report(result_of(many, predictions(many)), tmp_path / "page.html"))
    assert re.search(r"Shown are the classes with most errors; \d+ more are left out", page.text)


def test_a_run_that_was_killed_while_writing_still_has_a_page(tmp_path):
    folder = run_folder(tmp_path / "run")
    with (folder / "log.csv").open("a") as file:
        file.write("901,9,train/lo")
    read(report(folder))


@pytest.mark.fast
def test_what_cannot_be_reported(tmp_path):
    with pytest.raises(DataError, match=r"has neither result\.json nor log\.csv; expected a run folder"):
        report(tmp_path)
    with pytest.raises(DataError, match=r"absent\.json: cannot be read"):
        report(tmp_path / "absent.json")
    folder = run_folder(tmp_path / "run")
    with (folder / "log.csv").open("a") as file:
        file.write("nine,9,train/loss,1.0\n")
    with pytest.raises(DataError, match=r"log\.csv: line \d+ is 'nine,9,train/loss,1\.0'; expected step,epoch,name"):
        report(folder)
    (folder / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"log\.csv: its first line is 'a,b'; expected step,epoch,name,value"):
        report(folder)
    (tmp_path / "set.json").write_text('{"images": []}')
    with pytest.raises(DataError, match=r'set\.json: has no "format": "maskwright-result"'):
        report(tmp_path / "set.json")
    (tmp_path / "cut.json").write_text('{"format": "maskwright-result", "summary": {}}')
    with pytest.raises(DataError, match=r"cut\.json: written by maskwright an unknown version and not readable"):
        report(tmp_path / "cut.json")


@pytest.mark.fast
def test_a_chart_leaves_out_what_is_not_finite_and_draws_the_rest():
    assert chart({}) == ""
    assert chart({"loss": ([1, 2], [float("nan"), float("inf")])}) == ""
    assert "<circle" in chart({"loss": ([1, 2], [float("nan"), 0.5])})
    svg = chart({"loss": (list(range(10_000)), np.sin(np.arange(10_000) / 50).tolist()), "flat": ([0, 9_999], [0, 0])})
    numbers = re.findall(r"points=\"([^\"]+)\"", svg)
    assert len(numbers[0].split()) == 400
    pairs = np.array([p.split(",") for n in numbers for p in n.split()], float)
    assert (pairs >= 0).all()
    assert (pairs <= [460, 230]).all()


@pytest.mark.skipif(browser.executable() is None, reason="no Chromium on the PATH to look at the page with")
def test_a_browser_shows_the_page_without_a_complaint(tmp_path):
    data = data_set(12)
    evil = Ellipses(data.images, data.ids, (EVIL, "egg", "pebble"))
    result = result_of(evil, predictions(data))
    path = report(run_folder(tmp_path / "run", result))
    with browser.page() as page:
        page.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=2, mobile=True)
        page.open(path.as_uri())
        assert page.complaints() == []
        assert page.requests() == [path.as_uri()]
        sizes = page.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.width])")
        assert len(sizes) == 2 * len(result.examples)
        assert all(complete and natural > 50 and shown > 50 for complete, natural, shown in sizes)
        assert page.evaluate("document.title") == "run · maskwright"
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, "it must not scroll sideways on a phone"
        heights = page.evaluate(
            "[...document.querySelectorAll('svg.chart')].map(s => s.getBoundingClientRect().height)"
        )
        assert len(heights) == 7
        assert min(heights) > 100
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"


@pytest.mark.fast
def test_examples_are_shrunk_and_keep_their_masks():
    size = (900, 1500)
    box = torch.tensor([[300.0, 150.0, 600.0, 450.0]])
    from maskwright.structures import Masks

    masks = Masks.from_crops([torch.ones(300, 300, dtype=torch.bool)], torch.tensor([[300, 150]]), size)
    data = Ellipses([Instances(size, box, torch.tensor([0]), masks)], [7], ("disc",), (1,))
    found = Instances(size, box, torch.tensor([0]), masks, torch.tensor([0.9]))
    example = result_of(data, [found]).examples[0]
    assert example.size == (336, 560)
    assert example.found.masks.areas().item() == pytest.approx(112 * 112, rel=0.02)
    assert example.score.quality == 1

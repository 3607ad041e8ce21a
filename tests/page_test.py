"""The report page: read as a browser reads it, and by a browser where there is one."""

import base64
import copy
import html.parser
import io
import itertools
import json
import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from awm_jax.report import page as report_page
from awm_jax.report.page import page, write

EVIL = "\"'><script>alert(1)</script><img src=x onerror=alert(2)>&amp;</style>"
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars
    --disable-background-networking --disable-component-update --disable-sync""".split()


def _report():
    """A purified network; no number occurs twice, so that each has to be written itself."""
    return {
        "verdict": {"level": "suspicious", "headline": "There is a backdoor towards ship.",
                    "reasons": ["One small trigger is enough.", "No other class is like it."],
                    "limits": ["Triggers that depend on the image."]},
        "network": {"file": "from/elsewhere.pth", "format": "state_dict", "arch": "resnet18",
                    "classes": 3, "image_shape": [33, 34, 1], "notes": ["Normalised by itself."]},
        "images": {"count": 171, "classes": 2, "note": "Taken from the test set."},
        "classes": ["plane", "ship", "truck"],
        "scan": {"damage": [1.21, 9.37, 2.53], "anomaly": [-0.67, 8.11, 0.71], "suspect": 1,
                 "all_to_all": False, "stay": 0.29, "kept": 0.83, "concentration": 0.572,
                 "universal_flips": 0.613, "bends": False, "bent": 0.12, "strain": 0.3},
        "clean": {"before": {"correct": 161, "count": 172, "low": 0.888, "high": 0.963},
                  "after": {"correct": 159, "count": 173, "low": 0.869, "high": 0.951}},
        "flips": [{"name": "towards ship", "before": 0.987, "after": 0.012},
                  {"name": "out of all", "before": 0.455, "after": None}],
        "defence": {"name": "AWM", "paper": "Chai and Chen 2022", "status": "NOT_CONVERGED",
                    "advice": "run more epochs", "seconds": 41.5, "out": "clean/network.pth"},
        "layers": {"conv1": [50.5, 0.12, 3.3, 3.4, 3.5, 3.6, 3.7, 3.8, 3.9, 20.9],
                   "conv2": [4.1, 4.2, 4.3, 4.4, 4.6, 4.7, 4.8, 4.9, 5.1, 58.9]},
        "reproduce": {"command": "python -m scan --seed 7", "versions": {"jax": "0.10.2"},
                      "seconds": 77.3, "date": "2026-11-22"},
    }


def _scan_only(classes=3, suspect=None):
    """The same of a network of so many numbered classes that was only scanned."""
    report, damage = _report(), [1 + i / classes for i in range(classes)]
    report["classes"] = [str(i) for i in range(classes)]
    report["scan"].update(damage=damage, anomaly=damage, suspect=suspect)
    return {key: report[key] for key in report.keys() - {"clean", "flips", "defence", "layers"}}


def _hostile(value):
    """Every string of a report, names of layers and of versions too, ends in markup."""
    if isinstance(value, dict):
        return {key + EVIL * (key in {"conv1", "conv2", "jax"}):
                item if key == "level" else _hostile(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_hostile(item) for item in value]
    return value + EVIL if isinstance(value, str) else value


class _Page(html.parser.HTMLParser):
    """A page's tags with their attributes, its texts, and whether its tags balance."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img"}:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def words(self):
        return "\n".join(self.texts)


def _picture(seed=0, height=6, width=5):
    return np.random.default_rng(seed).random((height, width, 3))


def test_tags_balance_and_headings_are_in_order():
    for report in (_report(), _scan_only()):
        read = _Page(page(report, {"ab": _picture(), "cd": _picture(1)}))
        assert read.named("html") == [{"lang": "en"}]
        levels = [int(tag[1]) for tag, _ in read.tags if re.fullmatch(r"h\d", tag)]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
        assert [i["alt"][-11:] for i in read.named("img")] == [" pixels: ab", " pixels: cd"]


def test_it_needs_nothing_else():
    text = page(_report(), {"a": _picture()})
    read = _Page(text)
    assert {"script", "link", "iframe", "object"}.isdisjoint(tag for tag, _ in read.tags)
    assert all(i["src"].startswith("data:image/png;base64,") for i in read.named("img"))
    assert not re.search(r"url\(|@import|https?://|href=|srcset=|action=", text)
    assert read.named("meta")[2]["content"] == (
        "default-src 'none'; style-src 'unsafe-inline'; img-src data:")


def test_every_value_is_on_the_page():
    report = _report()
    words = _Page(page(report, {"trigger of ship": _picture()})).words
    texts = ["trigger of ship"]

    def collect(value):
        if isinstance(value, str):
            texts.append(value)
        elif isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                collect(item)

    collect(report)
    numbers = """33 × 34 × 1|171 of 2 classes|1.21|9.37|2.53|-0.67|8.11|0.71|0.29|0.83|57.2%|61.3%|
        93.6%|161 of 172|88.8% to 96.3%|91.9%|159 of 173|86.9% to 95.1%|98.7%|1.2%|45.5%|41.5 s|
        not measured|77.3 s|jax 0.10.2|conv1|conv2|AWM: NOT_CONVERGED|98.7% → 1.2%|93.6% → 91.9%"""
    numbers = [number.strip() for number in numbers.split("|")]
    numbers += [f"\n{value:.1f}\n" for row in report["layers"].values() for value in row]
    assert not [text for text in [*texts, *numbers] if text not in words]
    assert "1 ship" in words and "class 1" not in words


def test_names_from_outside_stay_text():
    plain = _Page(page(_report(), {"a": _picture()}))
    text = page(_hostile(_report()), {"a" + EVIL: _picture()})
    hostile = _Page(text)
    assert "<script" not in text
    assert [(tag, set(attrs)) for tag, attrs in hostile.tags] == [
        (tag, set(attrs)) for tag, attrs in plain.tags]
    assert hostile.words.replace(EVIL, "") == plain.words
    assert hostile.words.count(EVIL) == 31
    assert hostile.named("img")[0]["alt"].endswith("a" + EVIL)


def test_a_scan_alone():
    read = _Page(page(_scan_only(), {}))
    assert "only scanned" in read.words and "none" in read.texts
    for absent in ("How it was checked", "Mask values", "Pictures", "suspect", "→", "After"):
        assert absent not in read.words
    clean = {"before": _report()["clean"]["before"]}
    words = _Page(page({**_scan_only(), "clean": clean}, {})).words
    assert "161 of 172" in words and "After" not in words and "→" not in words


def test_all_to_all_and_empty_lists():
    report = _scan_only()
    report["scan"]["all_to_all"] = True
    report["verdict"].update(limits=[], reasons=[])
    report["network"]["notes"] = []
    words = _Page(page(report, {})).words
    assert "every class (all-to-all)" in words and "cannot see" not in words


@pytest.mark.parametrize("classes, suspect, rows", [
    (40, None, 40), (41, None, 20), (200, 199, 20), (200, 3, 21), (1, 0, 1)])
def test_of_many_classes_the_largest_and_the_suspect(classes, suspect, rows):
    read = _Page(page(_scan_only(classes, suspect), {}))
    assert len(read.named("tr")) == rows + 1
    largest = [f"class {i} " for i in reversed(range(classes))][:min(rows, 20)]
    assert [text for text in read.texts if re.fullmatch(r"class \d+ ", text)][:20] == largest
    assert (f"The 20 largest of {classes};" in read.words) == (classes > 40)
    assert read.texts.count("suspect") == (suspect is not None)


def test_bars_by_hand():
    report = _report()
    report["scan"]["damage"] = [math.nan, 8.0, 2.0]
    read = _Page(page(report, {}))
    widths = [attrs["style"] for attrs in read.named("i")]
    assert widths[:3] == ["width:100.00%", "width:25.00%", "width:0.00%"]
    assert widths[5:] == ["width:98.70%", "width:1.20%", "width:45.50%", "width:0.00%"]
    assert [attrs["style"] for attrs in read.named("s")] == [
        "left:88.80%;width:7.50%", "left:86.90%;width:8.20%"]
    assert "not finite" in read.texts
    assert [attrs["style"] for attrs in read.named("td") if "style" in attrs][:2] == [
        "--v:0.505", "--v:0.001"]


@pytest.mark.parametrize("height, width, shown", [(32, 32, 160), (28, 28, 168), (224, 200, 200)])
def test_pictures_decode_to_their_pixels(height, width, shown):
    pixels = _picture(1, height, width)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = (-1, 2, 0.5), (0, 1, np.nan), 1 / 255
    read = _Page(page(_report(), {"a": pixels, "grey": pixels[..., :1]}))
    image, figure = read.named("img")[0], read.named("figure")[0]
    with Image.open(io.BytesIO(base64.b64decode(image["src"].split(",")[1]))) as png:
        found = np.asarray(png)
    np.testing.assert_array_equal(found, np.round(255 * np.nan_to_num(np.clip(pixels, 0, 1))))
    assert found[0, :3].tolist() == [[0, 255, 128], [0, 255, 0], [1, 1, 1]]
    assert read.named("img")[1]["src"] == _Page(page(_report(), {
        "c": np.repeat(pixels[..., :1], 3, axis=2)})).named("img")[0]["src"]
    assert (image["width"], image["height"], figure["style"], shown % width) == (
        str(width), str(height), f"--w:{shown}px", 0)


def test_what_is_given_is_checked():
    for key in ("verdict", "network", "images", "classes", "scan", "reproduce"):
        with pytest.raises(KeyError, match=key):
            page({name: value for name, value in _report().items() if name != key}, {})
    for place, key, value, message in (
            ("verdict", "level", "fine", "got 'fine'"), ("scan", "suspect", 3, "and 3"),
            ("scan", "suspect", -1, "and -1"), ("scan", "damage", [1.0], r"\(1, 3\)"),
            ("layers", "conv3", [1.0], "layer 'conv3' of 1")):
        report = copy.deepcopy(_report())
        report[place][key] = value
        with pytest.raises(ValueError, match=message):
            page(report, {})
    for shape in ((4, 4), (4, 4, 2), (0, 4, 3)):
        with pytest.raises(ValueError, match=r"picture 'a' of shape " + re.escape(str(shape))):
            page(_report(), {"a": np.zeros(shape)})


def test_the_report_is_saved_beside_it(tmp_path):
    report = _report()
    report["scan"]["damage"] = np.array([1.0, np.inf, 2.0])
    report["scan"].update(suspect=np.int64(1), all_to_all=np.bool_(False))
    report["network"]["file"] = pathlib.Path("name\udcff.pth")  # a byte that is no UTF-8
    write(tmp_path / "deep" / "x.html", report, {"a": _picture()})
    text = (tmp_path / "deep" / "x.html").read_text(encoding="utf-8")
    assert text == page(report, {"a": _picture()}) and "name\\udcff.pth" in text
    saved = json.loads((tmp_path / "deep" / "x.json").read_text(encoding="utf-8"))
    assert saved["scan"] == {**_report()["scan"], "damage": [1.0, None, 2.0]}
    assert saved["network"]["file"] == "name\udcff.pth"
    assert {k: saved[k] for k in saved.keys() - {"scan", "network"}} == {
        k: report[k] for k in report.keys() - {"scan", "network"}}
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["x.html", "x.json"]
    with pytest.raises(ValueError, match=r"got x\.json"):
        write(tmp_path / "x.json", report, {})


@pytest.mark.parametrize("failing", ["html", "json"])
def test_a_failed_write_leaves_the_old_files(tmp_path, monkeypatch, failing):
    for name in ("x.html", "x.json"):
        (tmp_path / name).write_text("old")
    whole = pathlib.Path.write_text

    def breaks(path, text, **options):
        broken = f".{failing}" in path.name
        whole(path, text[:9] if broken else text, **options)
        if broken:
            raise OSError("disk full")

    monkeypatch.setattr(report_page.pathlib.Path, "write_text", breaks)
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path / "x.html", _report(), {})
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"x.html": "old", "x.json": "old"}


# Opens each page in a frame of a phone's width, and writes down what the browser makes of it: how
# wide it is, how many texts leave the frame outside the boxes that scroll, and the lowest contrast
# of a text with what lies behind it (WCAG's definition).
MEASURE = """<!DOCTYPE html><meta charset="utf-8"><body><script>
const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
function paint(colours) {
  for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
  return [...canvas.getImageData(0, 0, 1, 1).data].map(v => v / 255);
}
function measure(view) {
  const style = e => view.getComputedStyle(e);
  let lowest = 99, hidden = 0;
  for (const e of view.document.body.querySelectorAll("*")) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    const behind = [];
    for (let up = e; up; up = up.parentElement) behind.unshift(style(up).backgroundColor);
    const pair = [light(paint(behind)), light(paint([...behind, style(e).color]))];
    lowest = Math.min(lowest, (Math.max(...pair) + .05) / (Math.min(...pair) + .05));
    if (!e.closest(".scroll") && e.getBoundingClientRect().right > 390.5) hidden += 1;
  }
  const {body, documentElement: root} = view.document;
  return {width: root.scrollWidth, hidden, lowest, text: body.innerText.length,
          background: style(body).backgroundColor};
}
const found = {}, pages = PAGES;
for (const [name, text] of Object.entries(pages)) {
  const frame = document.createElement("iframe");
  frame.style = "width:390px;height:900px;border:0";
  frame.onload = () => { found[name] = measure(frame.contentWindow);
    if (Object.keys(found).length === Object.keys(pages).length)
      document.body.innerHTML = "<pre>MEASURED" + JSON.stringify(found) + "DONE</pre>"; };
  frame.srcdoc = text;
  document.body.append(frame);
}
</script>"""


def _browse(folder, pages, *options):
    """What `MEASURE` writes down of each page."""
    # The slash of a closing tag is escaped: inside a script it would end the script.
    texts = json.dumps(pages).replace("</", r"<\/").replace("<script", r"<\u0073cript")
    (folder / "measure.html").write_text(MEASURE.replace("PAGES;", texts + ";"), encoding="utf-8")
    for attempt in range(3):  # on a busy machine a start was once seen to print nothing
        done = subprocess.run(
            [CHROMIUM, *FLAGS, *options, f"--user-data-dir={folder / str(attempt)}", "--dump-dom",
             (folder / "measure.html").as_uri()],
            capture_output=True, text=True, timeout=240)
        if found := re.search(r"<pre>MEASURED(.*)DONE</pre>", done.stdout):
            return json.loads(found[1])
    pytest.fail(done.stderr[-2000:])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_it_whole(tmp_path, dark):
    long = "x" * 300
    pictures = {"a": _picture(0, 32, 32), long: _picture(0, 20, 700)}
    named = copy.deepcopy(_report())
    named["classes"], named["layers"][long] = [long] * 3, named["layers"]["conv1"]
    named["network"]["file"] = named["reproduce"]["command"] = named["flips"][0]["name"] = long
    wide = "<div style='width:600px;color:#888;background:#999'>wide</div></main>"
    found = _browse(tmp_path, {
        "purified": page(_report(), pictures), "scan": page(_scan_only(200, 199), {}),
        "long": page(named, pictures), "hostile": page(_hostile(_report()), {EVIL: _picture()}),
        "wide": page(_report(), {}).replace("</main>", wide),
    }, *(["--blink-settings=preferredColorScheme=0"] if dark else []))
    # The measurement can fail: it sees a page that is too wide and a text that is too pale.
    control = found.pop("wide")
    assert control["width"] >= 600 and control["hidden"] == 1 and control["lowest"] < 2
    for name, seen in found.items():
        assert seen["text"] > 700 and seen["width"] <= 390 and seen["hidden"] == 0, (name, seen)
        assert seen["lowest"] >= 4.5, (name, seen)
        assert seen["background"] == ("rgb(20, 23, 26)" if dark else "rgb(251, 251, 249)")

"""The page a scan leaves: one HTML file that needs no other; its numbers as JSON beside it."""

import base64
import contextlib
import html
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from awm_jax import whole_files

_LEVELS = {"clean-looking": "✓", "suspicious": "!", "unclear": "?"}
_ALL_BARS, _LARGEST = 40, 20
_SHOWN = 160  # pixels on the screen, about: two pictures side by side on a phone
# Colours are chosen so that text on them has a contrast of at least 4.5 in light and in dark.
_STYLE = """
:root{--bg:#fbfbf9;--card:#fff;--ink:#1c1f23;--soft:#565c64;--line:#d9dce0;--bar:#5b7fa8;
--track:#e7e9ec;--heat:96 165 250;--suspicious:#b42318;--clean-looking:#1a6b3c;--unclear:#855400}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--card:#1c2024;--ink:#e7e9ec;--soft:#a8afb8;
--line:#363c43;--bar:#6d93c4;--track:#292e33;--heat:37 84 165;--suspicious:#ff8f80;
--clean-looking:#74d6a0;--unclear:#f0bb60}}
*{box-sizing:border-box} html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:anywhere;
font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Liberation Sans",Arial,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem 1rem 3rem} dt,dd,figure,.row p{margin:0}
h1{font-size:1.6rem;line-height:1.25;margin:.5rem 0 .75rem} h2{font-size:1.25rem;margin:0 0 .6rem}
h3{font-size:1rem;margin:1.6rem 0 .35rem} p,ul{margin:.35rem 0} ul{padding-left:1.2rem}
section{margin-top:2.2rem;padding-top:1.4rem;border-top:1px solid var(--line)}
header,.glance div,pre{background:var(--card);border:1px solid var(--line);border-radius:6px}
header{border-left:6px solid var(--level);padding:1rem 1.1rem}
.soft,small,dt,thead th,figcaption{color:var(--soft);font-size:.875rem;line-height:1.35}
.badge{display:inline-block;border:2px solid;color:var(--level);font-weight:700;padding:0 .6rem}
.facts,.glance{display:grid;gap:.7rem 2rem;margin:.6rem 0} .glance dd{font-weight:600}
.glance{grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.7rem;margin-top:1rem}
.glance div,pre{padding:.6rem .8rem} pre{white-space:pre-wrap;font-size:.875rem}
.scroll{overflow-x:auto} .scroll:focus-visible{outline:2px solid var(--bar)}
table{border-collapse:collapse;width:100%;font-size:.9375rem} b{font-weight:inherit}
th{text-align:left;font-weight:400;padding:.16rem .7rem .16rem 0} thead th{vertical-align:bottom}
table,.row p{font-variant-numeric:tabular-nums} .damage tbody th{width:34%}
.damage td:last-child,.damage th:last-child{text-align:right;width:6em;padding-right:0}
.value{display:flex;align-items:center;gap:.6rem} .value b{min-width:3.4rem;text-align:right}
.bar{display:block;position:relative;flex:1;height:.8rem;min-width:2.5rem;
background:var(--track)} .bar i{display:block;height:100%;background:var(--bar)}
.bar s{position:absolute;top:.05rem;height:.7rem;border:solid var(--ink);border-width:0 2px;
background:linear-gradient(var(--ink),var(--ink)) center/100% 2px no-repeat}
tr:has(.tag)>*{color:var(--suspicious);font-weight:700} tr:has(.tag) i{background:currentColor}
.tag{border:1px solid;border-radius:3px;font-size:.8125rem;padding:0 .35rem}
.row{display:grid;grid-template-columns:3.6rem 1fr;gap:0 .7rem;align-items:center;margin:.3rem 0}
.row p{grid-column:2} .pictures{display:flex;flex-wrap:wrap;gap:1rem;margin:.7rem 0}
figure{width:var(--w);min-width:8rem;max-width:100%} img{image-rendering:pixelated;width:var(--w);
max-width:100%;height:auto;display:block;outline:1px solid var(--line);margin-bottom:.3rem}
.masks{font-size:.8125rem;border-collapse:separate;border-spacing:1px}
.masks td{background:rgb(var(--heat)/var(--v));min-width:3.2rem;text-align:right;padding:.2rem}
.masks th{min-width:7.4rem;background:var(--bg);position:sticky;left:0}
.masks th+th{min-width:0;text-align:right;padding:.2rem;position:static}
@media(min-width:700px){main{padding:2rem 2rem 4rem} header{padding:1.4rem 1.6rem}
h1{font-size:2rem} .facts{grid-template-columns:1fr 1fr} .damage tbody th{width:26%}
.row{grid-template-columns:3.6rem 1fr 26rem} .row p{grid-column:3}}
"""


def _text(value: Any) -> str:
    """Something from outside, escaped; bytes of a file's name that are no text are spelt out."""
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode("utf-8"))


def _number(value: float | None, percent: bool = False) -> str:
    """Two digits after the point; of a share in percent one."""
    if value is None or not math.isfinite(value):
        return "not measured" if value is None else "not finite"
    return f"{100 * value:.1f}%" if percent else f"{value:.2f}"


def _bar(share: float, interval: tuple[float, float] | None = None) -> str:
    """A bar over [0, 1], hidden from screen readers: its value stands beside it in words."""
    # In this order max makes 0 of what is not a number.
    end, low, high = (100 * min(max(0.0, s), 1.0) for s in (share, *(interval or (0.0, 0.0))))
    whisker = f'<s style="left:{low:.2f}%;width:{max(0.0, high - low):.2f}%"></s>'
    return (f'<span class="bar" aria-hidden="true"><i style="width:{end:.2f}%"></i>'
            f"{whisker if interval else ''}</span>")


def _row(label: str, bar: str, words: str) -> str:
    """A labelled bar and what it says."""
    return f'<div class="row"><small>{label.capitalize()}</small>{bar}<p>{words}</p></div>'


def _list(items: Sequence[Any]) -> str:
    """A list of strings from outside; nothing where there are none."""
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>" if items else ""


def _facts(facts: Mapping[str, Any], kind: str = "facts") -> str:
    """Names and values, both from outside."""
    lines = (f"<div><dt>{_text(k)}</dt><dd>{_text(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="{kind}">{"".join(lines)}</dl>'


def _section(title: str, *parts: str) -> str:
    """A part of the page under its heading; nothing where it is empty."""
    return f"<section><h2>{title}</h2>{''.join(parts)}</section>\n" if any(parts) else ""


def _table(kind: str, title: str, words: str, head: Iterable[str], rows: Iterable[str]) -> str:
    """A table under its heading, in a box that scrolls by itself, by keyboard too."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (f'<h3>{title}</h3><p class="soft">{words}</p><div class="scroll" tabindex="0" '
            f'role="region" aria-label="{title}"><table class="{kind}"><thead><tr>{columns}</tr>'
            f"</thead><tbody>{''.join(rows)}</tbody></table></div>")


def _class_name(names: Sequence[Any], index: int) -> str:
    """A class's number, and its name where that says more."""
    name = str(names[index])
    return f"class {index}" if name in (str(index), "") else f"{index} {name}"


def _glance(report: Mapping[str, Any]) -> str:
    """What matters most, in a few words each."""
    scan, shares = report["scan"], {}
    facts = {"Suspected class": "every class (all-to-all)" if scan["all_to_all"] else
             "none" if scan["suspect"] is None else _class_name(report["classes"], scan["suspect"])}
    if clean := report.get("clean"):
        shares["Right on clean images"] = [
            c["correct"] / max(c["count"], 1) for c in (clean["before"], clean.get("after")) if c]
    if flips := report.get("flips"):
        worst = max(flips, key=lambda flip: flip["before"])
        shares["Images the strongest trigger moves"] = [worst["before"], worst["after"]]
    for name, pair in shares.items():
        facts[name] = " → ".join(_number(share, True) for share in pair if share is not None)
    if defence := report.get("defence"):
        facts["Purified with"] = f"{defence['name']}: {defence['status']}"
    return _facts(facts, "glance")


def _verdict(report: Mapping[str, Any]) -> str:
    """The answer, and what speaks for it."""
    verdict, level = report["verdict"], report["verdict"]["level"]
    return (
        f'<header style="--level:var(--{level})"><p class="soft">Backdoor report on '
        f"{_text(report['network']['file'])}, as it was given; "
        f'{_text(report["reproduce"]["date"])}</p><p class="badge"><span aria-hidden="true">'
        f"{_LEVELS[level]} </span>{level}</p><h1>{_text(verdict['headline'])}</h1>"
        f"{_list(verdict['reasons'])}</header>{_glance(report)}\n"
        + _section("What this scan cannot see", _list(verdict["limits"])))


def _damage(scan: Mapping[str, Any], names: Sequence[Any]) -> str:
    """A bar a class, the largest first; of many classes the largest alone, and the suspect."""
    damage, suspect = np.asarray(scan["damage"], float), scan["suspect"]
    order = [int(i) for i in np.argsort(-damage, kind="stable")]
    many = len(order) > _ALL_BARS
    peak = max((d for d in damage if math.isfinite(d)), default=0.0)
    rows = []
    for i in [i for rank, i in enumerate(order) if not many or rank < _LARGEST or i == suspect]:
        tag = '<span class="tag">suspect</span>' if i == suspect else ""
        rows.append(f'<tr><th scope="row">{_text(_class_name(names, i))} {tag}</th><td>'
                    f'<span class="value">{_bar(damage[i] / peak if peak > 0 else 0.0)}<b>'
                    f"{_number(damage[i])}</b></span></td><td>{_number(scan['anomaly'][i])}</td></tr>")
    which = f"The {_LARGEST} largest of {len(order)}; the JSON file has all." if many else ""
    words = ("How far a small trigger drives the network towards each class, in nats, and how many "
             f"standard deviations (sd) farther than towards the median class. {which}")
    return _table("damage", "Damage by class", words,
                  ("Class", "Damage (nats)", "Anomaly (sd)"), rows)


def _measures(scan: Mapping[str, Any]) -> str:
    """The scan's other numbers, each with what it means."""
    return "<h3>Other measures</h3>" + _facts({
        "Stay: mean probability of an image's own class, under the trigger that drives images out "
        "of their classes": _number(scan["stay"]),
        "Kept: classes its answers still fall into, as a share of those without it (an all-to-all "
        "backdoor keeps many while few images stay)": _number(scan["kept"]),
        "Universal flips: images whose answer is changed by the trigger that leads away from the "
        "network's own answers": _number(scan["universal_flips"], True),
        "Concentration: share of these that it sends into the same class":
            _number(scan["concentration"], True),
        "Bent: images whose answer is changed by a smooth warp of less than a pixel":
            _number(scan["bent"], True)})


def _picture(name: str, pixels: np.ndarray) -> str:
    """A picture at its own size, shown larger by a whole factor."""
    height, width = pixels.shape[:2]
    file = io.BytesIO()
    values = np.broadcast_to(np.nan_to_num(np.clip(pixels, 0, 1)), (height, width, 3))
    Image.fromarray(np.round(255 * values).astype(np.uint8)).save(file, format="PNG")
    shown = width * max(1, round(_SHOWN / max(height, width)))
    return (f'<figure style="--w:{shown}px"><img width="{width}" height="{height}" '
            f'alt="Picture of {width} by {height} pixels: {_text(name)}" '
            f'src="data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}">'
            f"<figcaption>{_text(name)}</figcaption></figure>")


def _before_after(report: Mapping[str, Any]) -> str:
    """Right answers with the interval that so few images leave, and what each trigger does."""
    rows, purified = [], "defence" in report
    if clean := report.get("clean"):
        rows.append("<h3>Right answers on clean images</h3>")
        for label in ("before", "after"):
            if c := clean.get(label):
                share = c["correct"] / max(c["count"], 1)
                rows.append(_row(label, _bar(share, (c["low"], c["high"])), (
                    f"{_number(share, True)} ({c['correct']:d} of {c['count']:d}; 95% interval "
                    f"{_number(c['low'], True)} to {_number(c['high'], True)})")))
    if flips := report.get("flips"):
        rows.append("<h3>Images that a recovered trigger moves off their class</h3>")
        for flip in flips:
            rows.append(f"<p>{_text(flip['name'])}</p>")
            rows += [_row(label, _bar(flip[label] or 0.0), _number(flip[label], True))
                     for label in ("before", "after") if flip[label] is not None or purified]
    return "".join(rows)


def _masks(layers: Mapping[str, Sequence[float]]) -> str:
    """The distribution of mask values, a row a layer, in stronger colour where more of them lie."""
    rows = (f'<tr><th scope="row">{_text(name)}</th>' + "".join(
        f'<td style="--v:{min(max(0.0, v / 100), 1.0):.3f}">{v:.1f}</td>' for v in values) + "</tr>"
        for name, values in layers.items())
    return _table("masks", "Mask values by layer",
                  "Percentage of a layer's masks from the value on top; scrolls where it is wide.",
                  ("Layer", *(f"{low / 10:.1f}" for low in range(10))), rows) if layers else ""


def _sections(report: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> Iterable[str]:
    """The page's parts from top to bottom."""
    shown = "".join(_picture(name, np.asarray(pixels, float)) for name, pixels in pictures.items())
    network, images, reproduce = report["network"], report["images"], report["reproduce"]
    defence = report.get("defence")
    yield _verdict(report)
    yield _section("What was found", _damage(report["scan"], report["classes"]),
                   f'<h3>Pictures</h3><div class="pictures">{shown}</div>' if shown else "",
                   _measures(report["scan"]))
    yield _section("What was done", _facts({
        "Defence": defence["name"], "Paper": defence["paper"], "Status": defence["status"],
        "Advice": defence["advice"], "Time": f"{defence['seconds']:.1f} s",
        "Purified network": defence["out"]}) if defence else
        "<p>The network was only scanned; nothing in it was changed.</p>",
        _masks(report.get("layers") or {}))
    yield _section("How it was checked", _before_after(report))
    yield _section("What was given", _facts({
        "File": network["file"], "Format": network["format"], "Architecture": network["arch"],
        "Classes": network["classes"],
        "Input (height × width × channels)": " × ".join(map(str, network["image_shape"])),
        "Images": f"{images['count']} of {images['classes']} classes"}),
        _list([*([images["note"]] if images["note"] else []), *network["notes"]]))
    versions = ", ".join(f"{name} {number}" for name, number in reproduce["versions"].items())
    yield _section(
        "How to reproduce it", f"<pre><code>{_text(reproduce['command'])}</code></pre>",
        f"<p>Took {reproduce['seconds']:.1f} s with {_text(versions)}. The JSON file beside this "
        "page has all numbers.</p>")


def _check(report: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> None:
    """Whether the page can be written."""
    scan, classes, level = report["scan"], len(report["classes"]), report["verdict"]["level"]
    sizes = len(scan["damage"]), len(scan["anomaly"])
    if level not in _LEVELS:
        raise ValueError(f"Expected a level among {', '.join(_LEVELS)}, got {level!r}.")
    if sizes != (classes, classes) or not 0 <= (scan["suspect"] or 0) < max(classes, 1):
        raise ValueError(f"Expected damage, anomaly and a suspect of {classes} classes, got "
                         f"{sizes} and {scan['suspect']}.")
    wrong = [f"layer {name!r} of {len(values)}" for name, values in (
        report.get("layers") or {}).items() if len(values) != 10]
    wrong += [f"picture {name!r} of shape {np.shape(pixels)}" for name, pixels in pictures.items()
              if np.ndim(pixels) != 3 or np.shape(pixels)[2] not in (1, 3) or not np.size(pixels)]
    if wrong:
        raise ValueError("Expected layers of 10 percentages and pictures of shape [H, W, 3] or "
                         f"[H, W, 1], got {', '.join(wrong)}.")


def page(report: Mapping[str, Any], pictures: Mapping[str, np.ndarray]) -> str:
    """One HTML file that says whether a network is suspicious, what was found and done, and why.

    It needs no other file, no script and no network; everything from outside is escaped.

    Args:
      report: ``'verdict'``, ``'network'``, ``'images'``, ``'classes'``, ``'scan'``,
        ``'reproduce'`` and, where there are any, ``'clean'``, ``'flips'``, ``'defence'`` and
        ``'layers'``; shares in [0, 1], layers in percent.
      pictures: captions to pictures ``[H, W, 3]`` or ``[H, W, 1]`` in [0, 1], in their order.

    Returns:
      The file's text.

    Raises:
      KeyError: a part is missing.
      ValueError: an unknown level, or a list or a picture of another size.

    Example:
      >>> text = page(report, {'trigger towards class 8': trigger})  # doctest: +SKIP
    """
    _check(report, pictures)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        # Should a name ever escape its escaping, the browser still runs and fetches nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>Backdoor report: {_text(report['network']['file'])}</title>"
        f"<style>{_STYLE}</style></head><body><main>\n"
        f"{''.join(_sections(report, pictures))}</main></body></html>\n")


def _plain(value: Any) -> Any:
    """What JSON can say: NumPy values as Python ones, null for what is not finite."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


def is_report(path: str | os.PathLike) -> bool:
    """Whether a JSON file is a report's, as `write` leaves it, and may give way to a newer one.

    Args:
      path: the JSON file.

    Returns:
      False also where there is none, or it cannot be read.

    Example:
      >>> is_report('pyproject.toml')
      False
    """
    try:
        found = json.loads(pathlib.Path(path).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and {"verdict", "network", "scan"} <= found.keys()


def write(path: str | os.PathLike, report: Mapping[str, Any],
          pictures: Mapping[str, np.ndarray]) -> None:
    """Writes the page, and the report as JSON beside it under the same name.

    Args:
      path: the HTML file; folders that are missing are made.
      report: as in `page`.
      pictures: as in `page`.

    Raises:
      ValueError: the path is that of the JSON file; and as `page`.

    Example:
      >>> write('runs/report.html', report, {})  # doctest: +SKIP
    """
    path = pathlib.Path(path)
    beside = path.with_suffix(".json")
    if beside == path:
        raise ValueError(f"Expected the name of an HTML file, got {path.name}.")
    texts = {path: page(report, pictures), beside: json.dumps(_plain(report), indent=1)}
    with contextlib.ExitStack() as both:  # renamed when the two are written
        for file, text in texts.items():
            both.enter_context(whole_files.writing(file)).write_text(text, encoding="utf-8")

"""The charts of a page, as Vega and Vega-Lite describe them. Their rows are members of the page's JSON.

Colors that must fit a light and a dark page are the variables of its style sheet. Marks that have text on them are
pastel on both, and the text is black. Names out of the checkpoint stand in rows and domains alone: in orders and
filters Vega would make code of them.
"""

from __future__ import annotations

from typing import Any

from ray_ckpt.pictures.contents import PageReport

__all__ = ["charts"]

_PASTEL = ["#8dd3c7", "#ffed6f", "#bebada", "#fdb4a7", "#9ecae1", "#fdc086", "#b3de69", "#fccde5", "#d9d9d9", "#ccebc5"]
_ON_PASTEL = "#111111"
_LINES = ["var(--series-1)", "var(--series-2)", "var(--series-3)", "var(--series-4)", "var(--series-5)"]
_WIDTH = 960

MAX_DRAWN = 8
"""Tensors whose parts are drawn; the table beside them has more."""

_PHASES = ["open", "plan", "copy", "prepare", "write", "checksum", "read", "set", "check", "commit"]

_CONFIG: dict[str, Any] = {
    "background": "transparent",
    "view": {"stroke": "var(--line)"},
    "axis": {
        "labelColor": "var(--text)",
        "titleColor": "var(--text)",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelLimit": 220,
        "labelFontSize": 12,
        "titleFontSize": 12,
    },
    "legend": {"labelColor": "var(--text)", "titleColor": "var(--text)", "labelFontSize": 12},
    "header": {"labelColor": "var(--text)", "titleColor": "var(--text)", "labelLimit": 260, "labelFontSize": 12},
    "text": {"fill": "var(--text)"},
}

Chart = dict[str, Any]


def charts(report: PageReport) -> dict[str, Chart]:
    """Id of an element of the page -> its chart: `mode`, `spec`, and `rows`, the path of its rows in the JSON."""
    found = {"modules": _chart("vega", "modules.nodes", _modules(report))}
    if report.reshard.flows:
        found["flows"] = _chart("vega-lite", "reshard.flows", _flows(report))
    if report.reshard.pieces:
        found["pieces"] = _chart("vega-lite", "reshard.pieces", _pieces(report))
    if report.phases:
        found["phases"] = _chart("vega-lite", "phases", _phases(report))
    if report.losses:
        found["losses"] = _chart("vega-lite", "losses", _losses())
    return found


def _chart(mode: str, rows: str, spec: dict[str, Any]) -> Chart:
    return {"mode": mode, "rows": rows, "spec": {**spec, "config": _CONFIG}}


def _modules(report: PageReport) -> dict[str, Any]:
    sections = [section.name for section in report.sections]
    inside = {"x": {"field": "x0"}, "y": {"field": "y0"}, "x2": {"field": "x1"}, "y2": {"field": "y1"}}
    text = {
        "signal": "{name: datum.path, tensors: datum.num_tensors, elements: format(datum.num_elements, ','), "
        "bytes: format(datum.num_bytes, ','), tensor: datum.text}"
    }
    is_wide = "(datum.x1 - datum.x0) > 34 && (datum.y1 - datum.y0) > 13"

    def labels(data: str, y: dict[str, Any], color: str) -> dict[str, Any]:
        return {
            "type": "text",
            "from": {"data": data},
            "interactive": False,
            "encode": {
                "update": {
                    "x": {"field": "x0", "offset": 4},
                    "y": y,
                    "text": {"signal": f"{is_wide} ? datum.name : ''"},
                    "limit": {"signal": "max(1, datum.x1 - datum.x0 - 8)"},
                    "fill": {"value": color},
                    "baseline": {"value": "top"},
                    "fontSize": {"value": 11},
                }
            },
        }

    def boxes(data: str, encode: dict[str, Any]) -> dict[str, Any]:
        return {"type": "rect", "from": {"data": data}, "encode": {"update": {**inside, "tooltip": text, **encode}}}

    treemap = {
        "type": "treemap",
        "field": "own_bytes",
        "sort": {"field": "value", "order": "descending"},
        "method": "squarify",
        "ratio": 1.6,
        "paddingInner": 1,
        "paddingOuter": 1,
        "paddingTop": 15,
        "round": True,
        "size": [{"signal": "width"}, {"signal": "height"}],
    }
    fill = {"fill": {"scale": "color", "field": "section"}, "stroke": {"value": "var(--page)"}}
    return {
        "width": _WIDTH,
        "height": 480,
        "autosize": "none",
        "data": [
            {"name": "rows", "transform": [{"type": "stratify", "key": "id", "parentKey": "parent"}, treemap]},
            {"name": "outer", "source": "rows", "transform": [{"type": "filter", "expr": "datum.children > 0"}]},
            {"name": "inner", "source": "rows", "transform": [{"type": "filter", "expr": "!datum.children"}]},
        ],
        "scales": [{"name": "color", "type": "ordinal", "domain": sections, "range": _PASTEL}],
        "marks": [
            boxes("outer", {"fill": {"value": "var(--panel)"}, "stroke": {"value": "var(--line)"}}),
            boxes("inner", fill),
            labels("outer", {"field": "y0", "offset": 3}, "var(--text)"),
            labels("inner", {"field": "y0", "offset": 3}, _ON_PASTEL),
        ],
    }


def _flows(report: PageReport) -> dict[str, Any]:
    writers = list(dict.fromkeys(flow.written_by for flow in report.reshard.flows))
    readers = list(dict.fromkeys(flow.read_by for flow in report.reshard.flows))
    return {
        "width": {"step": 26},
        "height": {"step": 22},
        "mark": {"type": "square", "color": "var(--series-1)", "opacity": 1},
        "encoding": {
            "x": {
                "field": "read_by",
                "type": "nominal",
                "title": "read by",
                "sort": None,
                "scale": {"domain": readers},
            },
            "y": {
                "field": "written_by",
                "type": "nominal",
                "title": "written by",
                "sort": None,
                "scale": {"domain": writers},
            },
            "size": {
                "field": "num_bytes",
                "type": "quantitative",
                "title": "bytes",
                "scale": {"range": [8, 380]},
                "legend": {"symbolFillColor": "var(--series-1)", "format": ",d"},
            },
            "tooltip": [{"field": name} for name in ("written_by", "read_by")]
            + [{"field": "num_bytes", "type": "quantitative", "format": ",d", "title": "bytes"}],
        },
    }


def _pieces(report: PageReport) -> dict[str, Any]:
    """Every tensor twice, as its first two dims: colored by who wrote, and by who reads."""
    pieces = report.reshard.pieces
    who = list(dict.fromkeys(name for piece in pieces for name in (piece.written_by, piece.read_by) if name))
    edge = "length(datum.shape) > {0} && datum.shape[{0}] > 0 ? (datum.offsets[{0}]{1}) / datum.shape[{0}] : {2}"
    edges = {
        "top": edge.format(0, "", 0),
        "bottom": edge.format(0, " + datum.sizes[0]", 1),
        "left": edge.format(1, "", 0),
        "right": edge.format(1, " + datum.sizes[1]", 1),
    }
    axes = {"axis": None, "scale": {"domain": [0, 1]}}
    place = {
        "x": {"field": "left", "type": "quantitative", **axes},
        "x2": {"field": "right"},
        "y": {"field": "top", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "reverse": True}},
        "y2": {"field": "bottom"},
    }
    color = {
        "field": "who",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": who, "range": _PASTEL},
        "legend": None if len(who) > 40 else {"title": None, "columns": 1 + len(who) // 20},
    }
    shown = ["tensor", "dtype", "shape", "offsets", "sizes", "num_bytes", "written_by", "read_by", "file"]
    label = {
        "x": {"field": "middle", "type": "quantitative", **axes},
        "y": {"field": "center", "type": "quantitative", "axis": None, "scale": {"domain": [0, 1], "reverse": True}},
        "text": {"field": "label"},
    }
    middles = {"middle": "(datum.left + datum.right) / 2", "center": "(datum.top + datum.bottom) / 2"}
    wide = "(datum.bottom - datum.top) >= 0.22 && (datum.right - datum.left) >= 0.2 ? datum.who : ''"
    return {
        "transform": [
            {"filter": f"datum.number < {MAX_DRAWN}"},
            {"fold": ["written_by", "read_by"], "as": ["side", "who"]},
            {"filter": "datum.who !== ''"},
            *({"calculate": expression, "as": name} for name, expression in {**edges, **middles}.items()),
            {"calculate": wide, "as": "label"},
            {"calculate": "datum.side === 'written_by' ? 'as written' : 'as read'", "as": "view"},
        ],
        "facet": {
            "row": {
                "field": "tensor",
                "sort": {"op": "min", "field": "number"},
                "title": None,
                "header": {"labelAngle": 0, "labelAlign": "left"},
            },
            "column": {"field": "view", "sort": ["as written", "as read"], "title": None},
        },
        "spacing": {"row": 6, "column": 12},
        "spec": {
            "width": 230,
            "height": 60,
            "layer": [
                {
                    "mark": {"type": "rect", "stroke": "#444444", "strokeWidth": 0.5},
                    "encoding": {**place, "color": color, "tooltip": [{"field": name} for name in shown]},
                },
                {
                    "mark": {"type": "text", "fill": _ON_PASTEL, "fontSize": 11, "limit": 220},
                    "encoding": label,
                },
            ],
        },
    }


def _phases(report: PageReport) -> dict[str, Any]:
    operations = list(dict.fromkeys(phase.operation for phase in report.phases))
    ranks = list(dict.fromkeys(phase.rank for phase in report.phases))
    phases = [name for name in _PHASES if any(phase.phase == name for phase in report.phases)]
    return {
        "transform": [
            {"calculate": "datum.start_s + datum.seconds", "as": "end_s"},
            {"calculate": "datum.phase === 'checksum' ? 1 : 0", "as": "inside"},
        ],
        "facet": {
            "row": {
                "field": "operation",
                "sort": operations,
                "title": None,
                "header": {"labelOrient": "top", "labelAnchor": "start", "labelAngle": 0},
            }
        },
        "resolve": {"scale": {"x": "independent", "y": "independent"}},
        "spec": {
            "width": 720,
            "height": {"step": 18},
            "mark": {"type": "bar", "stroke": "#444444", "strokeWidth": 0.5},
            "encoding": {
                "x": {"field": "start_s", "type": "quantitative", "title": "seconds"},
                "x2": {"field": "end_s"},
                "y": {"field": "rank", "type": "nominal", "sort": ranks, "title": None},
                "size": {"condition": {"test": "datum.inside === 1", "value": 6}, "value": 14},
                "color": {
                    "field": "phase",
                    "type": "nominal",
                    "sort": phases,
                    "scale": {"domain": phases, "range": _PASTEL},
                    "title": "phase",
                },
                "tooltip": [{"field": name} for name in ("operation", "rank", "phase")]
                + [{"field": name, "type": "quantitative"} for name in ("start_s", "seconds", "num_bytes")],
            },
        },
    }


def _losses() -> dict[str, Any]:
    return {
        "width": 720,
        "height": 260,
        "transform": [{"filter": "isFinite(datum.loss)"}],
        "mark": {"type": "line", "point": {"size": 16}, "strokeWidth": 1.5},
        "encoding": {
            "x": {"field": "step", "type": "quantitative", "title": "step", "axis": {"tickMinStep": 1}},
            "y": {"field": "loss", "type": "quantitative", "title": "loss", "scale": {"zero": False}},
            "color": {"field": "run", "type": "nominal", "title": None, "scale": {"range": _LINES}},
            "strokeDash": {"field": "run", "type": "nominal"},
            "tooltip": [{"field": "run"}, {"field": "step"}, {"field": "loss", "type": "quantitative"}],
        },
    }

"""What a fitted plan is worth, as JSON and as a page: beside fewer steps and DeepCache of the same seconds."""

import base64
import html
import io
import json
import platform
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lib.grid import cost
from lib.grid.plan import COMPUTE, Plan
from lib.judging import pairs
from lib.judging.estimates import MARGIN, Contrast, Estimate, columns, text
from lib.methods.fitting import Fitted, Fitting
from lib.study import figures, page
from lib.study.stage import Stage

FULL, FITTED = "full run", "fitted plan"
SHOWN = 8
"""Images of each row on the page."""
WORDS = {"better": "nearer to the full run's than", "worse": "farther from the full run's than",
         "as good": "as near to the full run's as", "undecided": "not told apart from"}
"""What a comparison says of two plans' images."""
LIBRARIES = ("torch", "diffusers", "transformers")


def certify(fitting: Fitting, found: Fitted, about: Mapping[str, str], out: Path) -> None:
    """Compare the full run, the plan and its controls on the report's noise and prompts, time them in turn, write it.

    Parameters
    ----------
    about : what else the certificate says of the fit
    out : Path of the plan; ``.certificate.json`` and ``.html`` lie beside it, and each control as a plan of its own
    """
    plans = {FULL: fitting.full, FITTED: found.plan, **found.controls}
    asked, count = fitting.requests["report"], fitting.effort.report_images
    made = {name: asked.images(plan, "report", range(count), title=name) for name, plan in plans.items()}
    own = f"own scheduler ({type(asked.pipe.scheduler).__name__})"
    made[own] = asked.plain("report", range(count), fitting.effort.steps, own)
    for name, plan in found.controls.items():
        plan.save(out.with_suffix(control_suffix(name)))
    table = _rows(fitting, plans, made, own)
    beside = {name: pairs.nearer(made[FITTED], made[name], made[FULL]) for name in found.controls}
    words = verdict(table.set_index("name"), beside)
    about = dict(about) | _where(fitting)
    rows = [{name: value for name, value in row.items() if value == value} for row in table.to_dict("records")]
    content = {"about": about, "verdict": words, "rows": rows,
               "beside": {name: contrast.columns("over") for name, contrast in beside.items()}}
    out.with_suffix(".certificate.json").write_text(json.dumps(content, indent=1, default=str) + "\n")
    out.with_suffix(".html").write_text(_page(about, words, table, made, found.plan, out))


def control_suffix(name: str) -> str:
    """Give the suffix of a control's file, beside the fitted plan's: "fewer steps" gives .fewer_steps.json."""
    return f".{Stage.key(name)}.json"


def _where(fitting: Fitting) -> dict[str, str]:
    """Say on what machine and with what libraries it was measured."""
    device = fitting.network.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"{platform.machine()} processor, {torch.get_num_threads()} threads")
    return {"device": name, "weights": str(fitting.network.dtype).removeprefix("torch.")} | {
        library: version(library) for library in LIBRARIES}


def _rows(fitting: Fitting, plans: Mapping[str, Plan], made: Mapping[str, Tensor], own: str) -> pd.DataFrame:
    """Give a row a plan, and one of the pipeline's own scheduler: seconds, cost, and how near to the full run."""
    asked, steps, timing = fitting.requests["report"], fitting.effort.steps, fitting.timing()
    runs = {name: partial(asked.images, plan, "report", range(asked.batch)) for name, plan in plans.items()}
    runs[own] = partial(asked.plain, "report", range(asked.batch), steps)
    seconds = cost.interleave(runs, fitting.effort.rounds)
    called, distance = pairs.perceptual(fitting.network.device)
    rows = []
    for name in runs:
        faster, low, high = cost.median_ratio(seconds[FULL], seconds[name])
        row = {"name": name, "steps": steps, "seconds": float(np.median(seconds[name])), "faster": faster,
               "faster_low": low, "faster_high": high}
        if plan := plans.get(name):
            row |= {"steps": plan.steps, "reuses": (plan.sheets != COMPUTE).any(), "predicted": timing.of(plan),
                    "macs": fitting.costs.executed(plan), "kept": fitting.costs.kept(plan, fitting.network.dtype)}
        for measure, of in {"PSNR": pairs.psnr, "SSIM": pairs.ssim, called: distance}.items():
            if name != FULL:
                row |= columns(measure, Estimate.of(of(made[name], made[FULL]).double().numpy()))
        rows.append(row)
    return pd.DataFrame(rows)


def verdict(rows: pd.DataFrame, beside: Mapping[str, Contrast]) -> list[str]:
    """Say in sentences what came of it: how fast, how near, and whether fewer steps do as well.

    Between the timing and these rounds a machine may have become slower or faster, for all runs alike: by as much as
    the full run did. What is predicted is compared at the speed of these rounds, and the change is told.

    Parameters
    ----------
    rows : a row a plan, by its name
    beside : of each control the comparison with the plan
    """
    longer = {name: rows.loc[name, "predicted"] / rows.loc[FITTED, "predicted"] - 1 for name in beside}
    return [*_speed(rows), *(_near(rows, name, contrast, longer[name]) for name, contrast in beside.items()),
            *_late(rows), *_instead(rows, beside, longer)]


def _slower(rows: pd.DataFrame) -> float:
    """Give how many times as long as predicted the full run took."""
    return rows.loc[FULL, "seconds"] / rows.loc[FULL, "predicted"]


def _speed(rows: pd.DataFrame) -> list[str]:
    plan, full, slower = rows.loc[FITTED], rows.loc[FULL], _slower(rows)
    expected = slower * plan["predicted"]
    said = [f"The fitted plan takes {plan['seconds']:.3g} s a call, {plan['faster']:.2f} [{plan['faster_low']:.2f}, "
            f"{plan['faster_high']:.2f}] times less than the full run, which takes {full['seconds']:.3g} s. "
            f"The prediction was {plan['predicted']:.3g} s, {full['predicted'] / plan['predicted']:.2f} times less; at "
            f"the speed of these rounds that is {expected:.3g} s, {abs(expected / plan['seconds'] - 1):.0%} "
            f"{'more' if expected > plan['seconds'] else 'less'} than measured. PSNR to the full run's images: "
            f"{text(plan, 'PSNR')} dB."]
    if not plan["reuses"]:
        said.append(f"It reuses nothing: it is {plan['steps']:.0f} full steps. So fewer steps are the answer here: "
                    "within the budget nothing came nearer on fresh noise.")
    if abs(slower - 1) > MARGIN:
        word = "longer" if slower > 1 else "less"
        said.append(f"The full run took {abs(slower - 1):.0%} {word} in these rounds than predicted: the machine has "
                    "changed its speed since the parts were timed, or the prediction is off.")
    return said


def _near(rows: pd.DataFrame, name: str, contrast: Contrast, longer: float) -> str:
    ratio, row, more = contrast.ratio, rows.loc[name], ""
    if longer > MARGIN:
        measured = row["seconds"] / rows.loc[FITTED, "seconds"] - 1
        more = f": {abs(measured):.0%} {'longer' if measured >= 0 else 'less'}, by prediction {longer:.0%} longer"
    return (f"Its images are {WORDS[contrast.word]} those of {name} ({row['steps']:.0f} steps, "
            f"{row['seconds']:.3g} s{more}): "
            f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}] times as far, over {contrast.n} images.")


def _late(rows: pd.DataFrame) -> list[str]:
    over = rows.loc[FITTED, "seconds"] / (_slower(rows) * rows.loc[FITTED, "predicted"]) - 1
    return [f"It takes longer than it was fitted to: {over:.0%}."] if over > MARGIN else []


def _instead(rows: pd.DataFrame, beside: Mapping[str, Contrast], longer: Mapping[str, float]) -> list[str]:
    said = []
    if any(contrast.word == "undecided" for contrast in beside.values()):
        said.append("What is not told apart may be with more images to report.")
    as_good = [name for name, contrast in beside.items()
               if contrast.word in ("as good", "worse") and name != "DeepCache"]
    if enough := [name for name in as_good if longer[name] <= MARGIN]:
        said.append(f"Fewer steps do as well here: {' and '.join(enough)} may be taken in the plan's place "
                    "(each is a plan in a file beside it, whose name ends in "
                    f"{' or '.join(map(control_suffix, enough))}).")
    elif as_good:
        soonest = rows.loc[as_good, "predicted"].idxmin()
        said.append(f"{soonest[0].upper()}{soonest[1:]} come as near or nearer, but take longer than the plan. Where "
                    "that time may be spent, take them, or fit again with the budget "
                    f"{1.01 * rows.loc[soonest, 'predicted']:.3g}s, by prediction {longer[soonest]:.0%} more than the "
                    "plan takes: a plan of as much time may come nearer still.")
    return said


def _page(about: Mapping[str, str], words: list[str], table: pd.DataFrame, made: Mapping[str, Tensor], plan: Plan,
          out: Path) -> str:
    """Give the certificate as a page that needs nothing else."""
    figures.style()
    rows = np.stack([2 * images[:SHOWN].float().numpy() - 1 for images in made.values()])
    grid = figures.grid(rows, list(made), cell=0.75)
    maps = [(f"{name} pass", figures.plan_map(plan, name)) for name in plan.passes]
    facts = "".join(f"<li>{html.escape(name)}: {html.escape(str(value))}</li>" for name, value in about.items())
    use = (f"from lib.apply import Planned\nfrom lib.grid.plan import Plan\n\nwith Planned(pipe, Plan.load("
           f"&quot;{html.escape(out.name)}&quot;)):\n    pipe(..., num_inference_steps={plan.asked_steps})")
    return page.document(html.escape(out.name), (
        f"<h1>A plan for {html.escape(about['pipeline'])}</h1>"
        f"{''.join(f'<p>{html.escape(sentence)}</p>' for sentence in words)}"
        f"<pre>{use}</pre><h2>Side by side</h2>{_figure(grid, 'The same noise and prompts in every row.')}"
        f"<h2>Numbers</h2><div class='wide'>{_html(table)}</div><h2>The plan</h2>"
        f"{''.join(_figure(figure, f'What runs, the {name}') for name, figure in maps)}"
        f"<h2>How it was made</h2><ul>{facts}</ul>"))


def _html(table: pd.DataFrame) -> str:
    """Give the rows as an HTML table with intervals."""
    shown = pd.DataFrame({"": table["name"], "steps": table["steps"], "s a call": table["seconds"].map("{:.3g}".format),
                          "predicted": table["predicted"].map("{:.3g}".format, na_action="ignore"),
                          "times faster": [text(row, "faster") for _, row in table.iterrows()],
                          "G MACs an image": (table["macs"] / 1e9).map("{:.3g}".format, na_action="ignore"),
                          "MiB kept": (table["kept"] / 2**20).map("{:.3g}".format, na_action="ignore")})
    for measure in [name.removesuffix("_low") for name in table if name.endswith("_low") and name != "faster_low"]:
        shown[measure] = ["-" if np.isnan(row[measure]) else text(row, measure) for _, row in table.iterrows()]
    return shown.fillna("-").to_html(index=False, border=0)


def _figure(figure: Figure, caption: str) -> str:
    """Give a figure with its caption as HTML."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return page.figure(base64.b64encode(buffer.getvalue()).decode(), caption, html.escape(caption))

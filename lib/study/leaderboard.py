"""A plan in, a row out: any plan on a teacher that ships, scored by judges that ship, among all that came before.

``python -m lib.study.leaderboard plan.json`` writes ``reports/leaderboard/``; ``--known`` adds what everybody knows and
the plans of the published study of the same name.
"""

import argparse
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from lib.grid import blocks, cost, sampling
from lib.grid.plan import HOLD, LINE, NoiseSchedule, Plan, PlanError, trailing
from lib.judging import controls, evaluate, extractor
from lib.judging.banks import Bank
from lib.judging.estimates import text
from lib.study import figures, params, paths, report
from lib.study.stage import free_processors
from lib.teachers import data, networks

TEACHERS = ("digits", "letters")
"""Those that ship; the study of the same name says how they are judged."""
ROUNDS, TIMED = 5, 16
"""Of the timing: rounds, and images of each."""
STEPS, INTERVALS = (50, 20, 10, 5), (2, 3, 5)
"""Of what everybody knows: fewer steps, and full steps of caches, every second, third and fifth."""


MANY = ("front", "family")
"""How files of plans begin that are a whole search's, or a series, not a method's choice."""
PLANS = {"01": ("forecast",), "04": ("",), "05": ("",)}
"""How files of plans begin that a study's notebooks bring to the board; 06's are students'."""
LIKE = {"learned": "LD3-like", "genetic": "ECAD-like"}
"""Whose kind they are: steps learned by gradient (arXiv 2405.15506), a genetic search over cells (2506.15682)."""


class Board:
    """The rows of one teacher, in ``reports/leaderboard/<teacher>.csv`` and ``.png``; their plans in a folder beside.

    Parameters
    ----------
    name : one of `TEACHERS`
    """

    def __init__(self, name: str):
        study = params.load(name)
        self.name, self.values = name, study["00_teacher_training"]
        self.ladder = [steps for steps in study["01_teacher_analysis"].dpm_steps if steps <= self.values.teacher_steps]
        torch.set_num_threads(min(self.values.threads, free_processors()))
        self.data = data.load(self.values.data, self.values.resolution, self.values.held_out, self.values.seed)
        self.model = networks.load(paths.DATA / "shipped" / name, "cpu", self.data.prompts, self.values.guidance)
        self.blocks = blocks.describe(self.model.network)
        self.fits = NoiseSchedule.of(self.model.schedule)
        self.teacher = Plan.full(trailing(self.values.teacher_steps, self.fits.train_timesteps), self.fits, self.blocks)
        self.macs = cost.count_model(self.model).executed
        self.file = paths.writable(paths.REPORTS / "leaderboard") / f"{name}.csv"

    def takes(self, plan: Plan) -> bool:
        """Say whether a plan is for this teacher."""
        try:
            plan.check_fits(self.blocks.names, self.fits)
        except PlanError:
            return False
        return True

    def known(self) -> dict[str, Plan]:
        """Give what everybody knows (fewer steps, DeepCache, TaylorSeer's lines), and the published study's plans."""
        found = controls.few_steps(self.teacher, dict.fromkeys(("DDIM, uniform", "DPM-Solver++, uniform"), STEPS))
        shallow, none = self.blocks.branch(0), np.zeros(len(self.blocks), dtype=bool)
        for interval in INTERVALS:
            found |= {f"DeepCache-like, 1:{interval}": Plan.deepcache(interval, shallow, self.teacher, HOLD),
                      f"DeepCache-like, forecast, 1:{interval}": Plan.deepcache(interval, shallow, self.teacher, LINE),
                      f"TaylorSeer-like, 1:{interval}": Plan.deepcache(interval, none, self.teacher, LINE)}
        for notebook, begins in PLANS.items():
            for path in sorted((paths.REPORTS / self.name).glob(f"{notebook}_*/plans/*.json")):
                plan, like = Plan.load(path), LIKE.get(path.stem.partition("_")[0])
                if self.takes(plan) and path.stem.startswith(begins) and not path.stem.startswith(MANY):
                    found[f"{path.stem.replace('_', ' ')} ({notebook}{f', {like}' * bool(like)})"] = plan
        return found

    @cached_property
    def _table(self) -> controls.Table:
        """What builds rows, on the report's noise, over DPM-Solver++'s full run and its fewest good steps."""
        extractors = extractor.load(paths.DATA / "shipped" / "judges" / self.name)
        bank = Bank("report", self.model, extractors, count=self.values.score_images, seed=self.values.report_seed,
                    precision=self.values.precision, work=paths.writable(paths.DATA / "leaderboard" / self.name))
        judge, second = evaluate.judges(extractors, self.data.images)
        ddim, best = (Plan.few_steps(self.teacher.steps, "uniform", self.teacher, order) for order in (1, 2))
        ladder = [Plan.few_steps(steps, "uniform", self.teacher, 2) for steps in self.ladder]
        fewest = controls.fewest(judge, bank.features, ladder, best)
        return controls.Table(partial(bank.features, title="images"), bank.features, self.macs, judge, second, best,
                              ddim, fewest, evaluate.prompts_of(bank, self.data))

    def add(self, plans: Mapping[str, Plan]) -> pd.DataFrame:
        """Score and time plans, and put them among the rows, cheapest last; one that is there already is made anew."""
        rows = self._table.rows(plans, "plan").assign(key=[plan.key for plan in plans.values()],
                                                      solver=[f"{plan.solver}, order {plan.order}" for plan in
                                                              plans.values()])
        noise = sampling.noise("analysis", 0, 0, TIMED, self.model.shape)
        runs = {name: partial(sampling.sample, self.model, plan, noise)
                for name, plan in {"": self._table.ddim, **plans}.items()}
        seconds = cost.interleave(runs, ROUNDS)
        rows["ms"] = [1000 * np.median(seconds[name]) / TIMED for name in plans]
        rows["faster"], rows["faster_low"], rows["faster_high"] = zip(
            *(cost.median_ratio(seconds[""], seconds[name]) for name in plans))
        for plan in plans.values():
            plan.save(paths.writable(self.file.with_suffix("")) / f"{plan.key}.json")
        if self.file.exists():
            before = pd.read_csv(self.file, dtype={"key": str})
            rows = pd.concat([before[~before["key"].isin(rows["key"])], rows], ignore_index=True)
        rows = rows.drop_duplicates("key").sort_values("macs", ascending=False)
        figures.style()
        figures.save(figures.board(rows), rows, self.file.parent, self.name)
        return rows


def page(boards: Mapping[str, pd.DataFrame]) -> str:
    """Give the boards as Markdown: what a row means, how to add one, a table and a picture a teacher."""
    parts = ["# Leaderboard", "Plans on the two teachers that ship, on the same noise: `score` and `second` are "
             "distances to the data set by two judges that ship (0 is as good as the data), `over DDIM` the score over "
             "that of DDIM's full run, `honest factor` how many times fewer MACs than the fewest even DPM-Solver++ "
             "steps that are surely at most 5 % worse than its full run. Times (ms an image) are of whose machine "
             "added a row; all else repeats. Five lines:",
             "```sh\npython - <<'END'\nfrom pathlib import Path\nfrom lib.study.leaderboard import Board\n"
             "plan = Board('digits').teacher.at((999, 799, 599, 399, 199))  # any plan: see lib/README.md\n"
             "plan.save(Path('mine.json'))\nEND\npython -m lib.study.leaderboard mine.json\n```"]
    for name, rows in boards.items():
        shown = pd.DataFrame({
            "plan": rows["name"], "steps": rows["steps"].astype(str), "solver": rows["solver"],
            "M MACs": (rows["macs"] / 1e6).map("{:.0f}".format), "times fewer": rows["macs_ratio"].map("{:.2f}".format),
            "honest factor": rows["honest_factor"].map("{:.2f}".format), "ms": rows["ms"].map("{:.2f}".format),
            "times faster": [text(row, "faster") for row in rows.to_dict("records")]})
        for title, column in {"score": "score", "second": "second_score", "over DDIM": "ddim_ratio",
                              "prompt score": "prompt_score"}.items():
            if column in rows and rows[column].notna().any():
                shown[title] = ["at the floor" if np.isnan(row[column]) else text(row, column)
                                for row in rows.to_dict("records")]
        parts += [f"## {name}", f"![score against cost]({name}.png)", report.markdown(shown)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m lib.study.leaderboard", description=__doc__.splitlines()[0])
    parser.add_argument("plans", type=Path, nargs="*", help="plans' JSON files; each goes to the teacher that it fits")
    parser.add_argument("--known", choices=TEACHERS, help="add what everybody knows, and the published study's plans")
    chosen = parser.parse_args()
    try:
        wanted = {path.stem: Plan.load(path) for path in chosen.plans}
        if len(wanted) < len(chosen.plans):
            raise ValueError("two of the files have one name, which would be two rows' name: give others.")
        boards = {name: Board(name) for name in TEACHERS}
        for title, plan in wanted.items():
            if not any(board.takes(plan) for board in boards.values()):
                raise PlanError(f"{title}: this plan is for none of the teachers that ship ({', '.join(TEACHERS)}).")
        for name, board in boards.items():
            own = {title: plan for title, plan in wanted.items() if board.takes(plan)}
            if chosen.known == name:
                own = board.known() | own
            if own:
                board.add(own)
        written = {name: pd.read_csv(board.file, dtype={"key": str}) for name, board in boards.items()
                   if board.file.exists()}
        (paths.REPORTS / "leaderboard" / "README.md").write_text(page(written))
        print(f"written: {paths.REPORTS / 'leaderboard' / 'README.md'}")
    except (PlanError, params.ParamsError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

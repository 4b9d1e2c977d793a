"""What a plan saves on compiled blocks, on the letters teacher: ratios within one run."""

from lib.apply import Planned
from lib.grid import blocks, cost
from lib.grid.pipelines import Requests
from lib.grid.plan import Plan
from lib.methods.fitting import Fitting
from lib.study import paths
from lib.teachers import networks

STEPS, IMAGES = 20, 8


def test_a_plan_saves_on_compiled_blocks_what_its_macs_say():
    pipe = networks.pipeline(str(paths.ROOT / "data" / "shipped" / "letters"))
    options = {"guidance_scale": 3.0, "height": 32, "width": 32}
    asked, full = Requests(pipe, ("a red bold serif R on yellow",), options, IMAGES), Fitting.full_of(pipe, STEPS)
    plans = {"full": full, "DeepCache 1:3": Plan.deepcache(3, blocks.describe(pipe.unet).branch(0), full)}
    costs = cost.count_requests(asked, full)
    macs, table = {name: costs.executed(plan) for name, plan in plans.items()}, {}
    for how, compiling in (("as it is", None), ("compiled", {})):
        def runs(name, compiling=compiling):
            def run():
                with Planned(pipe, plans[name], compiling=compiling):
                    asked.plain("report", range(IMAGES), STEPS)

            return run

        table[how] = cost.speed_ups({name: runs(name) for name in plans}, macs, IMAGES, 9)
        print(f"\n{how}:\n{table[how].round(3).to_string(index=False)}")

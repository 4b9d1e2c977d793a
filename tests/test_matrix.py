"""A sample of the matrix of pipelines, and that its file is of the installed diffusers' pipelines."""

import matrix
import numpy as np
import pandas as pd
import pytest
import reference
import torch

from lib.apply import Planned
from lib.grid.blocks import CHAINS
from lib.grid.plan import COMPUTE, HOLD, PlanError
from lib.study import paths

TABLE = pd.read_csv(paths.REPORTS / "pipelines.csv", keep_default_na=False)


@pytest.mark.parametrize(("name", "word"), [
    ("StableDiffusionXLControlNetImg2ImgPipeline", "right"), ("FluxFillPipeline", "right"), ("LDMPipeline", "right"),
    ("StableDiffusion3PAGPipeline", "right"), ("SemanticStableDiffusionPipeline", "right"),
    ("HunyuanVideoPipeline", "right"), ("Lumina2Pipeline", "right"), ("QwenImagePipeline", "right"),
    ("WanPipeline", "right"), ("BriaPipeline", "right"), ("AuraFlowPipeline", "right"), ("HunyuanDiTPipeline", "right"),
    ("MochiPipeline", "refused"), ("CogView4Pipeline", "refused"), ("LatentConsistencyModelPipeline", "refused")])
def test_a_pipeline_is_what_the_matrix_says(name, word):
    assert matrix.check(name)["word"] == word == TABLE.set_index("pipeline").loc[name, "word"]


@pytest.mark.parametrize("interval", [(0, 3), (2, 5)])
def test_a_pipeline_whose_given_pass_comes_first_is_told_by_its_first_pair(interval):
    pipe, options = matrix.build("LuminaPipeline")
    full = matrix.own_steps(pipe, options)
    with Planned(pipe, full.guided(interval)), pytest.raises(PlanError, match="on the null pass's side"):
        matrix.call(pipe, options)


def test_passes_of_texts_of_unlike_lengths_hold_a_column_in_which_a_block_runs():
    pipe, options = matrix.build("QwenImagePipeline")
    texts = torch.randn(1, 7, options["prompt_embeds"].shape[-1], generator=torch.Generator().manual_seed(1))
    options = options | {"negative_prompt_embeds": texts, "negative_prompt_embeds_mask": torch.ones(1, 7).long(),
                         "true_cfg_scale": 3.0}
    full = matrix.own_steps(pipe, options)
    cells, net = full.cells, np.full(full.steps, COMPUTE)
    cells[3:6, 1:], net[3:6] = HOLD, HOLD
    plan = full.with_cells(cells, net)
    with reference.Watched(pipe.transformer, plan) as watch:
        matrix.call(pipe, options)
    with Planned(pipe, plan), matrix.watched(pipe.transformer) as outputs:
        matrix.call(pipe, options)
    assert len(outputs) == len(watch.outputs) == 2 * full.steps
    for one, other in zip(outputs, watch.outputs):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_every_transformer_that_plans_take_was_seen_to_be_right():
    assert set(CHAINS) <= set(TABLE.loc[TABLE["word"] == "right", "network"])


def test_prose_says_how_many_there_are():
    assert f"one of {len(CHAINS)} transformers" in (paths.ROOT / "lib" / "README.md").read_text()
    right = TABLE.loc[TABLE["word"] == "right", "network"].nunique()
    assert f"{right} networks take plans" in (paths.ROOT / "README.md").read_text()


def test_none_is_silently_wrong():
    assert set(TABLE["pipeline"]) == set(matrix.NAMES), "run: python tests/matrix.py"
    assert not (TABLE["word"] == "wrong").any()
    assert (TABLE.loc[TABLE["word"] != "right", "said"] != "").all()

"""A sample of the matrix of pipelines, and that its file is of the installed diffusers' pipelines."""

import matrix
import pandas as pd
import pytest

from lib.grid.blocks import CHAINS
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

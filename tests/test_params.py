"""Params files and notebook parameters: what is refused, and that all studies say the same things."""

import io

import pytest
import rehearse
import torch
from ruamel.yaml import YAML

from lib.study import params, paths
from lib.study.params import ParamsError, TeacherTraining

SMOKE = (paths.PARAMS / "smoke.yaml").read_text().replace("checkpoint: data/shipped/digits", "checkpoint: ''")


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PARAMS", tmp_path)

    def write(text):
        (tmp_path / "mine.yaml").write_text(text)
        return params.load("mine")

    return write


def test_all_studies_have_the_same_keys_in_the_same_order_and_load(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    keys = {}
    for study in params.studies():
        content = YAML(typ="safe", pure=True).load((paths.PARAMS / f"{study}.yaml").read_text())
        only = content.pop("only", [params.section(notebook) for notebook in params.NOTEBOOKS])
        keys[study] = [(name, list(values)) for name, values in content.items()]
        assert list(params.load(study)) == [name for name in params.NOTEBOOKS if params.section(name) in only]
    assert len(keys) >= 3
    for study, found in keys.items():
        names = {name for name, _ in found}
        assert found == [section for section in keys["smoke"] if section[0] in names], study


@pytest.mark.parametrize("study", rehearse.STAND_INS)
def test_studies_of_published_checkpoints_can_be_rehearsed(tmp_path, monkeypatch, study):
    (tmp_path / "pictures").mkdir()
    rehearse.pictures(tmp_path / "pictures", 8)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model_index.json").write_text("{}")
    with (tmp_path / "smoke_it.yaml").open("w") as file:
        YAML().dump(rehearse.small(study, tmp_path), file)
    notebooks = params.notebooks(study)
    monkeypatch.setattr(paths, "PARAMS", tmp_path)
    assert list(params.load("smoke_it")) == list(notebooks)


def test_a_study_may_have_some_notebooks_only(write):
    text = YAML(typ="safe", pure=True).load(SMOKE)
    part = {name: values for name, values in text.items() if name in ("common", "teacher_training", "block_search")}
    for only, fault in ((["teacher_training", "block_search"], None), (["block_search"], "only: must be a list"),
                        (["teacher_training", "blocks"], "only: must be a list"), ("teacher_training", "only: must be"),
                        (["teacher_training"], r"unknown: \['block_search'\]"),
                        (["teacher_training", "block_search", "comparison"], r"missing: \['comparison'\]")):
        buffer = io.StringIO()
        YAML(typ="safe", pure=True).dump({"only": only} | part, buffer)
        if fault is None:
            assert list(write(buffer.getvalue())) == ["00_teacher_training", "02_block_search"]
            continue
        with pytest.raises(params.ParamsError, match=fault):
            write(buffer.getvalue())


def test_numbers_like_1e_4_are_numbers(write):
    loaded = write(SMOKE.replace("learning_rate: 2e-3", "learning_rate: 1e-4"))
    assert loaded["00_teacher_training"].learning_rate == 1e-4


@pytest.mark.parametrize(("old", "new", "fault"), [
    ('"columns", "annealed"]', '"columns", "columns"]', "pruners: Value error, one stands twice"),
    ('["DiP-GO", "columns"', '["columns"', "pruners: Value error, add DiP-GO, with which all are compared"),
    ("kernels: [1, 3]", "kernels: [1, 5]", "kernels: Value error, add 3, the teacher's own"),
    ("kernels: [1, 3]", "kernels: [2, 3]", "kernels.0: Input should be 1, 3, 5 or 7"),
    ("widths: [0.5, 1.0]", "widths: [0.5]", "widths: Value error, add 1.0, the teacher's own"),
    ("memory_steps: [4, 8]", "memory_steps: [8, 8]", "memory_steps: Value error, one stands twice"),
    ("seed: 0", "seed: zero", "seed: Input should be a valid integer"),
    ("seed: 0", "seed: -1", "seed: Input should be greater than or equal to 0"),
    ("seed: 0", "seed: 0.5", "seed: Input should be a valid integer"),
    ("seed: 0", "seed: yes", "seed: Input should be a valid integer"),
    ("seed: 0", "sead: 0", "sead is no parameter here"),
    ("seed: 0\n", "\n", "seed is missing"),
    ("learning_rate: 2e-3", "learning_rate: 0", "learning_rate: Input should be greater than 0"),
    ("learning_rate: 2e-3", "learning_rate: '2e-3'", "learning_rate: Input should be a valid number"),
    ("learning_rate: 2e-3", "learning_rate: .nan", "learning_rate"),
    ("held_out: 0.25", "held_out: 1.5", "held_out: Input should be less than 1"),
    ("data: digits", "data: digit", "data: .*must be digits, letters or letters:COUNT, a file or folder that exists"),
    ("second_task: denoising", "second_task: clip",
     "second_task: Value error, must be denoising, rotation, torch-fidelity:NAME"),
    ("report_seed: 1\n", "\n", "report_seed is missing"),
    ("latency_repeats: 5", "latency_repeats: 4", "latency_repeats: Input should be greater than or equal to 5"),
    ("precision: auto", "precision: fp16", "precision: Input should be 'fp32', 'bf16' or 'auto'"),
    ("resolution: 16", "resolution: 15", "resolution: Input should be a multiple of 8"),
    ("partials: 2", "partials: 0", "partials: Input should be greater than or equal to 1"),
    ("widths: [16, 32, 32]", "widths: 16", "widths: Input should be a valid list"),
    ("widths: [16, 32, 32]", "widths: [16]", "widths: List should have at least 2 items"),
    ("budgets: [0.5]", "budgets: [1.5]", r"budgets.0: Input should be less than or equal to 1"),
    ("guidance: 1.0", "guidance: 0.5", "guidance: Input should be greater than or equal to 1"),
    ("guidance: 1.0", "guidance: 2.0", "guidance is 2, and the network reads nothing by which to guide it"),
    ("claim_guidance: [1.0]", "claim_guidance: [1.5]", "guided and unguided runs do not mix in a study"),
    ("claim_guidance: [1.0]", "claim_guidance: []", "claim_steps, claim_solvers and claim_guidance must be as long"),
    ("latent_channels: 0", "latent_channels: 4", "latents need an autoencoder that is trained"),
    ("autoencoder_steps: 0", "autoencoder_steps: 9", "latent_channels is 0, autoencoder_steps 9"),
    ("common:", "comon:", r"sections missing: \['common'\]; unknown: \['comon'\]"),
    ("common:", "extra: {}\ncommon:", r"unknown: \['extra'\]"),
    ("common:", "common: [", "is no YAML"),
    (SMOKE, "", "sections missing"),
    (SMOKE, "- 1", "sections missing"),
])
def test_a_wrong_params_file_is_refused_with_its_name(write, old, new, fault):
    assert old in SMOKE
    with pytest.raises(ParamsError, match=f"params/mine.yaml.*{fault}"):
        write(SMOKE.replace(old, new, 1))


def test_an_unknown_study_is_refused_with_those_there_are():
    with pytest.raises(ParamsError, match="unknown study 'digit'.* There are: cifar10, ddpm_cifar10, digits, .*smoke"):
        params.load("digit")


def test_a_cpu_machine_asked_for_cuda_says_so(write, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ParamsError, match="device is cuda, but this machine has no CUDA device. Set device: cpu"):
        write(SMOKE.replace("device: cpu", "device: cuda"))


@pytest.mark.parametrize(("able", "precision"), [
    ({"avx512_bf16": True, "amx_bf16": False}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"bf16": True}, "bf16"),
    ({"avx2": True, "avx512_bf16": False}, "fp32"), ({}, "fp32")])
def test_precision_is_what_the_processor_is_quick_at(write, monkeypatch, able, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert write(SMOKE)["00_teacher_training"].precision == precision
    assert write(SMOKE.replace("precision: auto", "precision: bf16"))["00_teacher_training"].precision == "bf16"


def test_a_notebook_binds_its_own_names_and_no_others():
    values = params.load("smoke")["00_teacher_training"].model_dump()
    bound = TeacherTraining.bind(values | {"np": object(), "p": 3})
    assert bound.model_dump() == values
    with pytest.raises(ParamsError, match="notebook: widths is missing"):
        TeacherTraining.bind({name: value for name, value in values.items() if name != "widths"})
    with pytest.raises(ParamsError, match="batch_size: Input should be greater than or equal to 1"):
        TeacherTraining.bind(values | {"batch_size": 0})


def test_a_study_named_by_hand_gives_its_parameters_or_is_refused(capsys):
    values = params.load("smoke")["00_teacher_training"].model_dump()
    wanted = params.load("digits")["00_teacher_training"]
    assert TeacherTraining.bind(values | {"study": "digits"}) == wanted
    assert "taken from params/digits.yaml" in capsys.readouterr().out
    assert TeacherTraining.bind(wanted.model_dump()) == wanted and not capsys.readouterr().out
    with pytest.raises(ParamsError, match="notebook: batch_size, save_every: not as in params/digits.yaml"):
        TeacherTraining.bind(wanted.model_dump() | {"save_every": 7, "batch_size": 5})
    with pytest.raises(ParamsError, match="unknown study 'none'"):
        TeacherTraining.bind(values | {"study": "none"})
    with pytest.raises(ParamsError, match="study letters has no 07_transformer: see `only` in params/letters.yaml"):
        params.Transformer.bind(params.load("smoke")["07_transformer"].model_dump() | {"study": "letters"})
    assert TeacherTraining.bind(values | {"batch_size": 5}).batch_size == 5  # in smoke one plays
    letters = params.load("smoke_letters")["00_teacher_training"]
    assert TeacherTraining.bind(values | {"study": "smoke_letters"}) == letters
    assert TeacherTraining.bind(letters.model_dump() | {"batch_size": 5}).batch_size == 5


@pytest.mark.parametrize("study", ["../params/digits", "/etc/passwd", "", "digits.yaml", "./digits"])
def test_a_study_is_a_name_and_no_path(study):
    with pytest.raises(params.ParamsError, match="unknown study"):
        params.load(study)

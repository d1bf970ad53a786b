"""The schema reports every fault at once, by name, before torch is imported."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs.document import fields, help_text, reference_page
from configs.load import load_config, to_yaml
from configs.schema import Config, ModelConfig
from model.attention.registry import attention_names
from model.faults import model_faults
from model.gha.faults import gha_faults
from model.parallel.faults import tensor_faults
from pretrain.engines import engine_faults
from tests.helpers import cluster_processes
from tests.unit.configs.good import GOOD, faults_of

ROOT = Path(__file__).resolve().parents[4]


def test_exponents_are_numbers_and_overrides_win(good: Path) -> None:
    config = load_config(good, ["--model.num_heads=16", "--run.folder=elsewhere", "--validation.samples=null"])
    assert config.optimizer.lr == 1e-3
    assert (config.model.num_heads, config.run.folder, config.validation.samples) == (16, "elsewhere", None)


def test_written_config_reads_back_equal(good: Path, tmp_path: Path) -> None:
    config = load_config(good, ["--schedule.kind=wsd"]).resolved(tokenizer_size=500)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 8), (20, 19), (20, 0), (1000, 950)])
def test_every_resolved_schedule_is_sound(good: Path, tmp_path: Path, kind: str, steps: int, warmup: int) -> None:
    overrides = [f"--schedule.kind={kind}", f"--training.steps={steps}", f"--schedule.warmup_steps={warmup}"]
    config = load_config(good, overrides).resolved(tokenizer_size=500)
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_resolved_config_has_no_open_defaults(good: Path) -> None:
    config = load_config(good, ["--schedule.kind=wsd", "--model.activation=swiglu"]).resolved(tokenizer_size=500)
    assert config.model.vocab_size == 512  # the next multiple of 64
    assert config.model.head_dim == 8
    assert config.model.ffn_hidden_size == 192  # 8/3 · 64 = 170.7, the next multiple of 64
    assert config.model.max_position_embeddings == 32
    assert config.schedule.decay_steps == 1


def test_all_faults_of_a_file_are_reported_at_once(good: Path) -> None:
    faults = faults_of(
        good,
        "--model.num_head=8",
        "--model.num_layers=two",
        "--training.precision=fp16",
        "--schedule.warmup_steps=1.5",
        "--nonsense=1",
        "--data=3",
        world_size=2,
    )
    text = "\n".join(faults)
    assert len(faults) == 6
    assert "model.num_head = 8: unknown key; did you mean num_heads?" in text
    assert "model.num_layers = 'two': must be a valid integer" in text
    assert "training.precision = 'fp16': must be 'fp32', 'bf16' or 'fp8'" in text
    assert "schedule.warmup_steps = 1.5" in text
    assert "nonsense = 1: unknown key" in text
    assert "data = 3: must be a mapping" in text


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--model.num_heads=7"], "model.num_heads = 7: must divide hidden_size (64) unless head_dim is given"),
        (["--model.head_dim=3", "--model.position=rope"], "model.head_dim = 3: must be even"),
        (["--model.attention=gqa"], "model.num_kv_heads = null: gqa needs it"),
        (["--model.attention=gqa", "--model.num_kv_heads=3"], "model.num_kv_heads = 3: must divide num_heads (8)"),
        (["--model.attention=mhe"], f"model.attention = 'mhe': known: {', '.join(attention_names())}"),
        (["--model.attention=[mha, mhe]"], f"mhe is not known; known: {', '.join(attention_names())}"),
        (["--model.attention=mhe_add x 3, mha"], "a pattern is a list, [mhe_add x 3, mha]; known: mha"),
        (["--model.attention=[]"], "model.attention = []: a list must have from 1 to 16384 layers"),
        (["--model.attention=[mhe_add x 0, mha]"], "a variant of a list must be repeated at least once"),
        (["--model.attention=[mhe_add x 9, mha]"], "a list of 10 layers, but num_layers is"),
        (["--model.attention=[mha x 99999]"], "a list must have from 1 to 16384 layers"),
        (["--model.attention=[mha, 3]"], "a list holds names of variants, such as [mhe_add x 3, mha]"),
        (
            ["--model.attention=[mha, sha]", "--model.key_embedding=false"],
            "only mhe_add, mhe_mul, mhe_low_rank have it, not mha and sha",
        ),
        (["--model.num_kv_heads=2"], "have it, not mhe_add; set it to null"),
        (["--model.embedding_position=before"], "model.embedding_position = 'before': used only by mhe_* with position rope"),
        (
            ["--model.attention=mha", "--model.embedding_position=before", "--model.position=rope"],
            "model.embedding_position = 'before': only mhe_add, mhe_mul, mhe_low_rank have it, not mha",
        ),
        (
            ["--model.attention=sha", "--model.key_embedding=false"],
            "model.key_embedding = false: only mhe_add, mhe_mul, mhe_low_rank have it, not sha",
        ),
        (["--model.attention=el", "--model.head_dim=16"], "model.head_dim = 16: el splits the hidden state into heads"),
        (["--model.attention=el", "--model.num_heads=7"], "model.num_heads = 7: must divide hidden_size (64)"),
        (
            ["--model.attention=mhe_mul", "--model.attention_kernel=shared_scores"],
            "'shared_scores': only mhe_add, mhe_low_rank have it, not mhe_mul; take auto, math, sdpa",
        ),
        (
            ["--model.attention_kernel=shared_scores", "--model.position=rope", "--model.embedding_position=before"],
            "with embedding_position before every head has its own scores; take auto, math or sdpa, or after",
        ),
        (["--model.max_position_embeddings=16"], "data.sequence_length = 32: at most model.max_position_embeddings (16)"),
        (
            ["--model.position=none", "--model.max_position_embeddings=64"],
            "model.max_position_embeddings = 64: only position learned",
        ),
        (
            ["--training.global_batch_size=5"],
            "training.global_batch_size = 5: must be a multiple of micro_batch_size * processes",
        ),
        (["--training.precision=bf16", "--parallel.zero_stage=0"], "parallel.zero_stage = 0: 1, 2 or 3 with precision bf16"),
        (["--parallel.zero_stage=4"], "parallel.zero_stage = 4: must be at most 3"),
        (["--backend=fsdp", "--parallel.zero_stage=2"], "parallel.zero_stage = 2: only backend deepspeed has it, not fsdp"),
        (["--parallel.pipeline_balance=time"], "parallel.pipeline_balance = 'time': only parallel.pipeline above 1"),
        (
            ["--backend=fsdp", "--training.precision=fp8", "--training.micro_batch_size=1", "--data.sequence_length=24"],
            "training.micro_batch_size = 1: times data.sequence_length (24) must be a multiple of 16 with precision fp8",
        ),
        (["--backend=horovod"], "backend = 'horovod': known: deepspeed, fsdp"),
        (["--training.compile=true"], "training.compile = true: only backend fsdp has it, not deepspeed"),
        (["--training.precision=fp8"], "training.precision = 'fp8': only backend fsdp has it, not deepspeed; take bf16"),
        (
            ["--parallel.cpu_offload=true", "--parallel.zero_stage=0"],
            "parallel.cpu_offload = true: needs parallel.zero_stage 1",
        ),
        (["--schedule.warmup_steps=10"], "schedule.warmup_steps = 10: must be below training.steps (10)"),
        (["--validation.sets=[a]"], "validation.sets = ['a']: must be a mapping"),
        (["--validation.sets={wiki: 3}"], "validation.sets.wiki = 3: must be text: write it in quotes, '3'"),
        (["--validation.sets={a/b: data}"], "validation.sets.a/b = 'data': a name has 1 to 60 letters, digits, `_`, `.` and"),
        (["--validation.tasks={'': x.jsonl}"], "validation.tasks. = 'x.jsonl': a name has 1 to 60 letters"),
        (["--validation.tasks={docs: ''}"], "validation.tasks = {'docs': ''}: must not have empty paths"),
        (["--validation.tasks_every_steps=5"], "validation.tasks_every_steps = 5: needs validation.tasks; or must be null"),
        (["--schedule.decay_steps=2"], "schedule.decay_steps = 2: only kind wsd has it"),
        (["--schedule.kind=wsd", "--schedule.decay_steps=11"], "schedule.decay_steps = 11: at most"),
        (["--optimizer.lr=-1"], "optimizer.lr = -1: must be at least 1e-12"),
        (["--optimizer.lr=.nan"], "optimizer.lr = nan: must be a finite number"),
        (["--model.bias=1"], "model.bias = 1: must be true or false"),
        (["--run.seed=2024-99-99"], "--run.seed=2024-99-99: the value is not valid YAML: month must be in 1..12"),
        (["--parallel.zero_stage=true"], "parallel.zero_stage = true: must be a valid integer"),
        (["--parallel.zero_stage=1.0"], "parallel.zero_stage = 1.0: must be a valid integer"),
        (["--training.steps=6_4"], "training.steps = '6_4': must be a valid integer"),
        (["--optimizer.epsilon=1e300"], "optimizer.epsilon = 1e+300: must be at most 1"),
        (["--optimizer.lr=1e-320"], "optimizer.lr = 1e-320: must be at least 1e-12"),
        (["--run.folder="], "run.folder = '': String should have at least 1 character"),
        (["--a.b.c.d.e=1"], "a = {'b.c.d.e': 1}: unknown key"),
        (["--model." + ".".join("x" * 2000) + "=1"], "(4,005 characters) = 1: unknown key; known here: kind, attention"),
        (["--optimizer.lr=" + "9" * 1000], "(1,000 characters)"),
        (["--optimizer.lr=" + "[" * 5000], "the value is not valid YAML"),
        (["--run.seed=" + "1" * 200_000], "the value is not valid YAML: it has 200,000 characters; at most 131,072 are read"),
        (
            ["--model.hidden_size=100000000000", "--model.head_dim=8"],
            "model.hidden_size = 100000000000: must be at most 262144",
        ),
        (["model.bias=true"], "an override is written --section.field=value"),
    ],
)
def test_each_impossible_value_is_named(good: Path, overrides: list[str], expected: str) -> None:
    (fault,) = faults_of(good, *overrides)
    assert expected in fault


def test_faults_of_a_variants_fields_are_reported_with_all_others(good: Path) -> None:
    overrides = ["--model.attention=gqa", "--model.num_kv_heads=3", "--model.key_embedding=false", "--model.dropout=0"]
    faults = faults_of(good, *overrides, "--model.position=rope", "--model.head_dim=3", "--schedule.warmup_steps=10")
    assert [fault.partition(" = ")[0] for fault in faults] == [
        "schedule.warmup_steps",
        "model.key_embedding",
        "model.num_kv_heads",
        "model.head_dim",
    ]


@pytest.mark.parametrize("position", ["learned", "rope", "alibi", "none"])
@pytest.mark.parametrize("name", ["mhe_add", "mhe_mul"])
def test_key_embedding_is_free_for_mhe(good: Path, name: str, position: str) -> None:
    overrides = [f"--model.attention={name}", f"--model.position={position}", "--model.key_embedding=false"]
    assert not load_config(good, overrides, checks=[model_faults]).model.key_embedding


def test_the_schema_knows_no_variant() -> None:
    """All rules of variants are in the registry, so that a new one needs no change here."""
    for name in attention_names():
        fields = {"attention": name, "hidden_size": 60, "num_layers": 1, "num_heads": 4, "num_kv_heads": 3, "head_dim": 6}
        model = ModelConfig(**fields, position="none", embedding_position="before", key_embedding=False)  # type: ignore[arg-type]
        assert list(model.faults()) == []


def test_head_dim_frees_heads_from_the_hidden_size(good: Path) -> None:
    assert load_config(good, ["--model.num_heads=7", "--model.head_dim=5"]).model.head_width == 5


def test_batch_must_fit_the_number_of_processes(good: Path) -> None:
    load_config(good, world_size=2)
    (fault,) = faults_of(good, world_size=4)
    assert "training.global_batch_size = 4: must be a multiple of micro_batch_size * processes (2 * 4)" in fault


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["--parallel.tensor=2"], 1, "parallel.tensor = 2: must divide the number of processes (1)"),
        (["--parallel.tensor=4"], 6, "parallel.tensor = 4: must divide the number of processes (6)"),
        (["--parallel.tensor=2"], 8, "must be a multiple of micro_batch_size * processes / parallel.tensor (2 * 8 / 2)"),
        (["--parallel.tensor=16"], 16, "must divide num_heads (8), MLP width (256) and the 24 columns of qkv: 1, 2, 4, 8"),
        (
            ["--parallel.tensor=4", "--model.ffn_hidden_size=90"],
            4,
            "must divide num_heads (8), MLP width (90) and the 24 columns of qkv: 1, 2",
        ),
        (
            ["--parallel.tensor=4", "--model.head_dim=6"],
            4,
            "must divide num_heads (8), MLP width (256) and the 18 columns of qkv: 1, 2",
        ),
        (
            [
                "--parallel.tensor=4",
                "--model.attention=gqa",
                "--model.num_heads=12",
                "--model.num_kv_heads=6",
                "--model.head_dim=4",
            ],
            4,
            "MLP width (256), and 6 key/value heads or, as a multiple of that, the 48 columns of key_value: 1, 2",
        ),
        (
            ["--parallel.tensor=2", "--parallel.sequence=true", "--data.sequence_length=31"],
            2,
            "data.sequence_length = 31: must be a multiple of parallel.tensor (2) with parallel.sequence",
        ),
        (
            ["--parallel.mhe_gather=weights", "--model.attention=mha"],
            1,
            "parallel.mhe_gather = 'weights': mha projects nothing that ranks gather",
        ),
    ],
)
def test_each_impossible_layout_is_named(good: Path, overrides: list[str], world_size: int, expected: str) -> None:
    (fault,) = faults_of(good, *overrides, world_size=world_size)
    assert expected in fault


def test_tensor_parallel_sizes_that_fit(good: Path) -> None:
    """Also more ranks than key/value heads, and sequence parallelism on one rank, where it has no effect."""
    for overrides in (
        ["--model.attention=gqa", "--model.num_kv_heads=2"],
        ["--model.attention=mqa"],
        ["--model.attention=el"],
        [],
    ):
        assert load_config(good, [*overrides, "--parallel.tensor=8"], [tensor_faults], world_size=16).parallel.tensor == 8
    assert load_config(good, ["--parallel.sequence=true"], [tensor_faults]).parallel.sequence


def test_missing_sections_name_their_required_fields(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("run: {}\n")
    text = "\n".join(faults_of(path))
    for name in ("run.folder", "model.hidden_size", "data.sequence_length", "training.steps"):
        assert f"{name} = null: required" in text


def test_help_lists_every_field_within_100_columns() -> None:
    text = help_text()
    assert max(len(line) for line in text.splitlines()) <= 100
    for name, _, _, description in fields():
        assert f"{name} " in text if "[]" in name else f"--{name} " in text
        assert description, f"{name} is not documented"


def test_every_printed_default_is_the_fields(good: Path, tmp_path: Path) -> None:
    given = {name: default for name, _, default, _ in fields() if default != "required" and "[]" not in name}
    printed = {name: default.removeprefix("default ") for name, default in given.items()}
    overrides = [f"--{name}={value}" for name, value in printed.items()]
    required = ("model.num_heads", "optimizer.lr=", "data.path")
    assert load_config(good, [o for o in overrides if not any(name in o for name in required)]) == load_config(good)
    assert (printed["model.dropout"], printed["parallel.zero_stage"], printed["model.bias"]) == ("0.0", "1", "true")


def test_a_field_without_its_section_is_found(good: Path) -> None:
    (fault,) = faults_of(good, "--num_heads=64")
    assert "num_heads = 64: unknown key; did you mean model.num_heads?" in fault


def test_reference_page_is_the_schema() -> None:
    assert (ROOT / "docs/configuration.md").read_text(encoding="utf-8") == reference_page(), (
        "python -m configs.document writes it"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configurations_are_sound(path: Path) -> None:
    processes = cluster_processes(path) or 2
    checks = [model_faults, gha_faults, tensor_faults, engine_faults]
    assert isinstance(load_config(path, checks=checks, world_size=processes), Config)


def test_a_wrong_file_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(GOOD.replace("num_heads: 8", "num_heads: eight"))
    program = (
        "import sys, runpy; sys.argv = ['launch/pretrain.py', '--config', sys.argv[1]]\n"
        "try: runpy.run_path('launch/pretrain.py', run_name='__main__')\n"
        "finally: print('torch imported:', 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", program, str(bad)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "error: " in result.stderr
    assert "model.num_heads = 'eight': must be a valid integer" in result.stderr
    assert "Traceback" not in result.stderr
    assert "torch imported: False" in result.stdout


def test_end_of_document_comes_from_the_tokenizer_where_attention_needs_it(good: Path) -> None:
    assert load_config(good).resolved(500, 3).model.end_of_document is None
    apart = load_config(good, ["--model.attend_across_documents=false"])
    assert apart.resolved(500, 3).model.end_of_document == 3
    own = load_config(good, ["--model.attend_across_documents=false", "--model.end_of_document=7"])
    assert own.resolved(500, 3).model.end_of_document == 7


@pytest.mark.parametrize(("packing", "across"), [("concatenate", True), ("documents", False), ("best_fit", False)])
def test_packing_decides_whether_documents_are_kept_apart(good: Path, packing: str, across: bool) -> None:
    model = load_config(good, [f"--data.packing={packing}"]).resolved(500, 3).model
    assert (model.attend_across_documents, model.end_of_document) == (across, None if across else 3)
    with_end = ["--model.end_of_document=7", f"--data.packing={packing}"]
    if across:
        assert load_config(good, ["--model.attend_across_documents=false"]).resolved(500, 3).model.separates_documents
    else:
        assert load_config(good, with_end).resolved(500, 3).model.end_of_document == 7
        (fault,) = faults_of(good, f"--data.packing={packing}", "--model.attend_across_documents=true")
        wanted = f"data.packing {packing} keeps documents apart; set it to null, or take data.packing concatenate"
        assert fault == f"model.attend_across_documents = true: {wanted}"


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["--model.end_of_document=7"], "model.end_of_document = 7: used only with attend_across_documents false"),
        (
            ["--model.attend_across_documents=false", "--model.end_of_document=50", "--model.vocab_size=50"],
            "model.end_of_document = 50: must be below vocab_size (50)",
        ),
    ],
)
def test_an_end_of_document_that_means_nothing(good: Path, overrides: list[str], fault: str) -> None:
    assert any(found.startswith(fault) for found in faults_of(good, *overrides))


CONSTRAIN, VOTE = "--gha.stage=constrain", "--gha.stage=vote"
SCHEDULE = ("--gha.stage=schedule", "--gha.vote_at_step=5", "--gha.groups=2")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([CONSTRAIN, "--gha.groups=8"], "gha.groups = 8: must be below model.num_heads (8)"),
        ([CONSTRAIN], "gha.max_groups = 8: must be below model.num_heads (8)"),
        ([VOTE, "--gha.groups=4", "--gha.heads_per_group=2"], "gha.heads_per_group = 2: times gha.groups (4) must be below"),
        ([VOTE, "--gha.max_groups=4", "--gha.heads_per_group=2"], "gha.heads_per_group = 2: times gha.max_groups (4)"),
        ([CONSTRAIN, "--gha.groups=2", "--gha.warmup_steps=3", "--gha.end_step=3"], "gha.end_step = 3: must be above"),
        ([SCHEDULE[0], "--gha.groups=2"], "gha.vote_at_step = null: stage schedule needs it"),
        ([*SCHEDULE, "--training.steps=5"], "gha.vote_at_step = 5: must be below training.steps (5)"),
        ([*SCHEDULE, "--model.position=alibi"], "gha.stage = 'schedule': with position alibi a head's slope"),
        (
            [CONSTRAIN, "--gha.groups=2", "--model.attention=gqa", "--model.num_kv_heads=2"],
            "gha.feature_map = 'value': the heads",
        ),
        ([*SCHEDULE, "--model.attention=sha"], "gha.stage = 'schedule': the heads of sha cannot be told apart"),
        ([CONSTRAIN, "--gha.groups=2", "--model.attention=el"], "gha.stage = 'constrain': the heads of el cannot"),
        ([CONSTRAIN, "--gha.groups=2", "--model.attention=mqa"], "gha.feature_map = 'value': the heads of mqa share"),
        ([CONSTRAIN, "--gha.groups=1"], "gha.groups = 1:"),
        (["--gha.gram_decay=1.0"], "gha.gram_decay = 1.0:"),
    ],
)
def test_faults_of_groups(good: Path, overrides: list[str], expected: str) -> None:
    faults = faults_of(good, *overrides)
    assert len(faults) == 1, faults
    assert faults[0].startswith(expected)


def test_heads_that_are_kept_are_sharded_over_ranks(good: Path) -> None:
    (fault,) = faults_of(good, *SCHEDULE, "--gha.groups=3", "--parallel.tensor=2", world_size=2)
    assert fault.startswith("gha.heads_per_group = 1: times gha.groups (3) must be a multiple of parallel.tensor (2)")
    gqa = ["--model.attention=gqa", "--model.num_kv_heads=2", "--gha.feature_map=output"]
    (fault,) = faults_of(good, *SCHEDULE, *gqa, "--parallel.tensor=2", world_size=2)
    assert fault.startswith("gha.stage = 'schedule': which key/value heads of gqa are kept")
    for overrides in ([CONSTRAIN, "--gha.groups=3"], SCHEDULE):
        checks = [model_faults, gha_faults, tensor_faults, engine_faults]
        load_config(good, [*overrides, "--parallel.tensor=2"], checks=checks, world_size=2)


@pytest.mark.parametrize(
    ("processes", "overrides", "expected"),
    [
        (4, ["--parallel.tensor=3"], "parallel.tensor = 3: must divide the number of processes (4)"),
        (6, ["--parallel.pipeline=4"], "parallel.pipeline = 4: must divide the number of processes (6)"),
        (
            6,
            ["--parallel.tensor=2", "--parallel.pipeline=2"],
            "parallel.tensor = 2: times parallel.pipeline (2 * 2) must divide the number of processes (6)",
        ),
        (2, ["--backend=fsdp", "--parallel.pipeline=2"], "parallel.pipeline = 2: only backend deepspeed has it, not fsdp"),
        (2, ["--parallel.replicate=2"], "parallel.replicate = 2: only backend fsdp has it, not deepspeed; set it to 1"),
        (
            6,
            ["--backend=fsdp", "--parallel.replicate=4", "--training.global_batch_size=12"],
            "parallel.replicate = 4: must divide the data-parallel ranks (6)",
        ),
        (2, ["--parallel.pipeline=2", "--parallel.zero_stage=2"], "parallel.zero_stage = 2: 0 or 1 with parallel.pipeline"),
        (4, ["--parallel.pipeline=4", "--training.micro_batch_size=1"], "parallel.pipeline = 4: at most model.num_layers (2)"),
        (
            2,
            ["--parallel.pipeline=2", "--training.micro_batch_size=4"],
            "training.global_batch_size = 4: at least parallel.pipeline (2) micro-batches for each pipeline (4 * 1 samples",
        ),
        (
            8,
            ["--parallel.tensor=2", "--parallel.pipeline=2", "--training.global_batch_size=6", "--training.micro_batch_size=1"],
            None,
        ),
        (
            8,
            ["--parallel.tensor=2", "--parallel.pipeline=2", "--training.global_batch_size=5", "--training.micro_batch_size=1"],
            "must be a multiple of micro_batch_size * processes / parallel.tensor / parallel.pipeline (1 * 8 / 2 / 2)",
        ),
    ],
)
def test_layouts_that_do_not_divide_are_named(good: Path, processes: int, overrides: list[str], expected: str | None) -> None:
    if expected is None:
        load_config(good, overrides, [engine_faults], world_size=processes)
        return
    faults = faults_of(good, *overrides, world_size=processes)
    assert any(expected in fault for fault in faults), faults

"""`load` and `dump` against each other, recipes against their own Run, messages against the place and the way out.

What 30 mistakes print on the command line is in test_wrong_inputs.py; that every field has an effect, in
test_config_effects.py.
"""

import dataclasses
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_runs import tiny_dict, tiny_run

from moe.config.layout import resolve
from moe.config.load import dump, known_routers, load, resolve_router, router_config, router_name
from moe.config.schema import LatentAttention, Run, Yarn
from moe.config.tree import Slot, fields_of
from moe.errors import ConfigError

ROUTER_FILE = """
from moe.config.schema import PositiveInt, RouterConfig, config
from moe.routers import topk

@config
class Config(RouterConfig):
    width: PositiveInt = 3

    def rows_per_token(self, *, num_experts, top_k):
        return float(top_k)

class Router(topk.Router):
    pass
"""


@pytest.fixture
def plain(tmp_path):
    return tiny_dict(tmp_path)


# ------------------------------------------------------------------------------------------------------ load and dump


def test_dump_and_load_are_inverse(tmp_path):
    for overrides in (
        [],
        ["model.moe=null"],
        [
            "model.moe.router=expert_choice",
            "data.tokenizer=bpe",
            "data.tokenizer.vocab_size=300",
            "model.vocab_size=300",
        ],
        [
            'model.rotary.yarn={"factor": 4, "original_length": 64}',
            "train.schedule=wsd",
            "train.schedule.decay_steps=1",
        ],
    ):
        run = tiny_run(tmp_path, *overrides)
        assert load(run) == run
        assert load(dump(run)) == run
        assert dump(load(json.loads(json.dumps(dump(run))))) == dump(run)


def test_run_json_alone_gives_the_run_back(tmp_path):
    run = tiny_run(tmp_path)
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema_version": 1, "run": dump(run), "meta": {"threads": 1}}))
    assert load(path) == load(str(path)) == run
    path.write_text(json.dumps(dump(run)))
    assert load(path) == run
    assert load(path, ["seed=3"]).seed == 3


def test_defaults_are_filled_in_from_the_classes(plain):
    run = load(plain)
    assert run.model.rotary.base == 10_000.0
    assert run.model.moe is not None
    assert run.model.moe.router == resolve_router("topk").Config()
    assert dump(run)["model"]["moe"]["router"]["name"] == "topk"


def test_configs_are_frozen_and_slotted(tmp_path):
    run = tiny_run(tmp_path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.seed = 1  # type: ignore[misc]
    for config in (run, run.model, run.model.moe, run.model.moe.router, run.data.sources[0]):  # type: ignore[union-attr]
        assert not hasattr(config, "__dict__")


def test_an_instance_built_in_python_is_checked_like_anything_else(tmp_path):
    run = tiny_run(tmp_path)
    wrong = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=-1))
    with pytest.raises(ConfigError, match=r"train\.steps must be an integer greater than 0, not -1"):
        load(wrong)
    wrong = dataclasses.replace(run, train=dataclasses.replace(run.train, schedule=run.evaluation))
    with pytest.raises(ConfigError, match=r"train\.schedule .* has no name: it must be one of cosine, wsd"):
        load(wrong)
    wrong = dataclasses.replace(run, name=Path("x"))
    with pytest.raises(ConfigError, match=r"name holds a PosixPath"):
        load(wrong)


def test_every_mistake_of_types_is_named_at_once(plain):
    with pytest.raises(ConfigError) as caught:
        load(plain, ["train.steps=2.5", "model.norm_eps=NaN", "train.optimizer.lr=abc"])
    for part in ("train.steps must be an integer", "model.norm_eps must be a number", "train.optimizer.lr", '"abc"'):
        assert part in str(caught.value)


def test_nothing_is_coerced(plain):
    for override in ("train.steps=2.0", 'train.steps="2"', "train.compile=1", "name=5", "model.tied_head=True"):
        with pytest.raises(ConfigError, match="must be"):
            load(plain, [override])
    assert load(plain, ["train.clip_norm=2"]).train.clip_norm == 2.0


def test_every_rule_between_fields_is_named_at_once(plain):
    with pytest.raises(ConfigError) as caught:
        load(plain, ["model.moe.top_k=9", "train.micro_rows=3", "train.schedule.warmup_steps=2"])
    for part in ("top_k (9) must be at most num_experts (4)", "batch_rows (4)", "warmup_steps (2) must be less than"):
        assert part in str(caught.value)


# --------------------------------------------------------------------------------------------------------- overrides


def test_overrides_reach_fields_elements_and_whole_objects(plain):
    run = load(
        plain,
        [
            "train.steps=7",
            "data.sources.0.weight=2",
            "model.attention.windows=[0, 8]",
            'model.rotary.yarn={"factor": 2, "original_length": 64}',
            "model.rotary.yarn.mscale=0.5",
            "data.sources.1=stdlib",
            "data.sources.1.weight=3",
        ],
    )
    assert run.train.steps == 7
    assert [source.weight for source in run.data.sources] == [2.0, 3.0]
    assert run.model.attention.windows == (0, 8)  # type: ignore[union-attr]
    assert run.model.rotary.yarn == Yarn(factor=2.0, original_length=64, mscale=0.5)


def test_the_order_of_overrides_does_not_matter(plain):
    overrides = [
        "model.moe.router=expert_choice",
        "model.moe.router.capacity_factor=2",
        "model.moe.top_k=1",
        "train.schedule.decay_steps=1",
        "train.schedule.name=wsd",
    ]
    runs = [load(plain, order) for order in itertools.permutations(overrides)]
    assert all(run == runs[0] for run in runs)
    assert router_name(runs[0].model.moe.router) == "expert_choice"  # type: ignore[union-attr]
    assert runs[0].train.schedule == load(plain, ["train.schedule=wsd", "train.schedule.decay_steps=1"]).train.schedule


def test_a_whole_object_comes_before_its_fields(plain):
    dense = load(plain, ["model.moe=null"])
    whole = 'model.moe={"num_experts": 8, "top_k": 2, "expert_hidden": 4, "router": "hash"}'
    with pytest.raises(ConfigError, match=r"model\.moe\.top_k has no place, model\.moe is null"):
        load(dense, ["model.moe.top_k=1"])
    for order in ([whole, "model.moe.top_k=1"], ["model.moe.top_k=1", whole]):
        run = load(dense, order)
        assert run.model.moe is not None
        assert (run.model.moe.num_experts, run.model.moe.top_k) == (8, 1)
        assert router_name(run.model.moe.router) == "hash"


@pytest.mark.parametrize("key", ["model.moe.router", "model.moe.router.name"])
def test_a_new_name_drops_the_old_fields_and_says_which(plain, key):
    plain["model"]["moe"]["router"] = {"name": "topk", "z_weight": 0.5}
    notices: list[str] = []
    run = load(plain, [f"{key}=loss_free"], notices=notices)
    assert run.model.moe is not None
    assert run.model.moe.router == resolve_router("loss_free").Config()
    (notice,) = notices
    assert "model.moe.router: topk -> loss_free drops" in notice
    assert "z_weight=0.5" in notice


def test_the_same_name_again_drops_nothing(plain):
    plain["model"]["moe"]["router"] = {"name": "topk", "z_weight": 0.5}
    notices: list[str] = []
    assert load(plain, ["model.moe.router=topk"], notices=notices) == load(plain)
    assert notices == []


def test_every_family_switches_by_name(plain):
    latent = ["num_heads=2", "kv_rank=8", "nope_dim=4", "rope_dim=4", "value_dim=4"]
    run = load(
        plain,
        [
            *(f"model.attention.{field}" for field in latent),
            "model.attention=latent",
            "data.tokenizer=bytes",
            "data.sources.0=stdlib",
            "train.schedule=cosine",
        ],
    )
    assert run.model.attention == LatentAttention(num_heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4)
    assert run.data.sources[0].name == "stdlib"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=5", ["train.stepz is no setting", "did you mean steps?", "known: steps, batch_rows"]),
        ("trian.steps=5", ["did you mean train?"]),
        ("lr=3e-4", ["there is train.optimizer.lr"]),
        ("out=x", ["out=DIR", "moe train"]),
        ("train.steps", ["'train.steps' must be path=value"]),
        ("=5", ["must be path=value"]),
        ("train..steps=5", ["must be path=value"]),
        ("train.steps.x=5", ["train.steps must be an integer greater than 0, and is 2"]),
        ("model.rotary.yarn.factor=2", ["model.rotary.yarn is null", 'model.rotary.yarn={"factor": 4.0']),
        (
            "model.moe.router=expertchoice",
            ["model.moe.router", "did you mean expert_choice?", "hash", "path/to/file.py"],
        ),
        ("model.moe.router=7", ["model.moe.router: 7 must be the name of a router", "topk"]),
        ("model.moe.router.scoore=5", ["model.moe.router (Config) has no field 'scoore'", "did you mean score?"]),
        ("model.moe.router.balance.scope=all", ["model.moe.router.balance.scope", '"sequence"', '"all"']),
        ("model.attention=gqa", ["one of grouped_query, latent", '"gqa"']),
        ("model.attention.head_dim=eight", ["model.attention.head_dim must be an integer", '"eight"', "head_dim=64"]),
        ("data.sources.0=file", ["did you mean files?", "stdlib"]),
        ("data.sources.3=files", ["data.sources is a list of 1", "0 to 1"]),
        ("data.sources.first.weight=2", ["'first' must be an index"]),
        ("data.sources=[]", ["a list of at least 1", "not []"]),
        ("data.tokenizer=bpe", ["data.tokenizer.vocab_size is required", "at least 258"]),
        ("train.precision=bf16", ['one of "float32", "bfloat16"', '"bf16"', "train.precision=float32"]),
        ("train.optimizer=3", ["train.optimizer must be one of adamw, muon"]),
        ('train.schedule={"name": "linear"}', ["unknown name 'linear'", "known: cosine, wsd"]),
        ("model.norm_eps=0", ["greater than 0, not 0", "model.norm_eps=1e-06"]),
        ("data.validation_fraction=1", ["greater than 0 and less than 1", "data.validation_fraction=0.1"]),
    ],
)
def test_a_wrong_override_names_place_rule_value_and_way_out(plain, override, parts):
    with pytest.raises(ConfigError) as caught:
        load(plain, [override])
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_key_twice_is_refused_however_it_is_spelt(plain):
    for pair in (["train.steps=3", "train.steps=3"], ["model.moe.router=hash", "model.moe.router.name=topk"]):
        with pytest.raises(ConfigError, match="given twice"):
            load(plain, pair)


# ----------------------------------------------------------------------------------------------------------- recipes

RECIPE = """
import dataclasses
from moe.config.load import load

def run(steps=2):
    return load({plain!r}, [f"train.steps={{steps}}"])

def longer():
    return run(steps=9)

def with_argument(steps):
    return run()

def _private():
    return run()

def wrong():
    return {{}}

def broken():
    from moe.config.schema import Train
    return Train(stepz=3)
"""


@pytest.fixture
def recipe(tmp_path, plain):
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE.format(plain=plain))
    return path


def test_a_recipe_gives_its_run_and_its_variants(recipe, plain):
    before = list(sys.path)
    assert load(recipe) == load(str(recipe)) == load(f"{recipe}:run") == load(plain)
    assert load(f"{recipe}:longer", ["seed=4"]) == load(plain, ["train.steps=9", "seed=4"])
    assert sys.path == before
    assert not (recipe.parent / "__pycache__").exists()


@pytest.mark.parametrize(
    ("variant", "parts"),
    [
        ("longest", ["no function 'longest'", "did you mean longer?", "known: longer", "run"]),
        ("with_argument", ["no function 'with_argument' that takes no arguments"]),
        ("_private", ["no function '_private'"]),
        ("wrong", ["line 17", "wrong() must return a moe.config.schema.Run, and returned dict"]),
        ("broken", ["line 22", "TypeError", "'stepz'", "did you mean steps?"]),
    ],
)
def test_a_wrong_recipe_names_its_file_and_line(recipe, variant, parts):
    with pytest.raises(ConfigError) as caught:
        load(f"{recipe}:{variant}")
    for part in [str(recipe), *parts]:
        assert part in str(caught.value)


def test_an_edited_recipe_is_read_again(recipe):
    assert load(recipe).train.steps == 2
    recipe.write_text(recipe.read_text().replace("steps=2", "steps=3"))
    assert load(recipe).train.steps == 3


# ----------------------------------------------------------------------------------------------------------- routers


def test_every_file_in_the_folder_is_a_router():
    folder = Path(__file__).parents[1] / "moe/routers"
    assert known_routers() == sorted(path.stem for path in folder.glob("[!_]*.py"))
    for name in known_routers():
        config = router_config(name)
        assert router_name(config) == name
        assert dump(config)["name"] == name


def test_a_router_from_a_file_outside_the_project(tmp_path, plain, monkeypatch):
    path = tmp_path / "elsewhere" / "wide.py"
    path.parent.mkdir()
    path.write_text(ROUTER_FILE)
    run = load(plain, [f"model.moe.router={path}", "model.moe.router.width=5"])
    assert run.model.moe is not None
    assert run.model.moe.router.width == 5  # type: ignore[attr-defined]
    assert dump(run)["model"]["moe"]["router"] == {"name": str(path), "width": 5}
    assert load(dump(run)) == run
    monkeypatch.chdir(path.parent)
    assert load(plain, ["model.moe.router=wide.py", "model.moe.router.width=5"]) == run
    with pytest.raises(ConfigError, match=r"model\.moe\.router\.width must be an integer greater than 0, not 0"):
        load(plain, [f"model.moe.router={path}", "model.moe.router.width=0"])


def test_a_router_from_an_installed_module(tmp_path, plain, monkeypatch):
    package = tmp_path / "their_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "wide.py").write_text(ROUTER_FILE)
    monkeypatch.syspath_prepend(tmp_path)
    run = load(plain, ["model.moe.router=their_package.wide"])
    assert dump(run)["model"]["moe"]["router"] == {"name": "their_package.wide", "width": 3}
    assert load(dump(run)) == run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("class Config", "class Settings"), "has no class Config"),
        (("class Router", "class Gate"), "has no class Router"),
        (("@config\n", ""), "under the decorator"),
        (("(RouterConfig)", ""), "subclass of moe.config.schema.RouterConfig"),
        (("width:", "name: str = 'x'\n    width:"), "must not have a field `name`"),
        (("topk.Router", "topk.Route"), "line 12: AttributeError"),
        (("class Router(topk.Router):", "class Router(topk.Router)"), "line 12: SyntaxError"),
    ],
)
def test_a_router_file_that_is_no_router_is_refused(tmp_path, plain, change, message):
    path = tmp_path / "router.py"
    path.write_text(ROUTER_FILE.replace(*change))
    with pytest.raises(ConfigError) as caught:
        load(plain, [f"model.moe.router={path}"])
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_router_config_refuses_unknown_fields():
    with pytest.raises(ConfigError, match="router topk has no field 'z_wait': did you mean z_weight"):
        router_config("topk", z_wait=1.0)


# ------------------------------------------------------------------------------------------------ rules between fields


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["name=a/b"], "name ('a/b') must be a folder's name"),
        (
            ["model.attention.num_heads=12", "model.attention.num_kv_heads=5"],
            "(12) must be divisible by num_kv_heads (5): use num_kv_heads=4 or 6",
        ),
        (["model.attention.windows=[1,2,3]"], "has 3 entries for model.num_layers=2"),
        (["model.rotary.fraction=0.3"], "of head_dim (8) is 2.4 dimensions"),
        (
            ["model.rotary.fraction=0.375"],
            "is 3 dimensions, and must be an even number of at least 2: use model.rotary.fraction=0.5",
        ),
        (["model.rotary.base=1"], "model.rotary.base (1.0) must be greater than 1"),
        (
            ['model.rotary.yarn={"factor": 2, "original_length": 8}'],
            "data.sequence_length (32) must not exceed yarn's factor (2.0) times original_length (8), 16: use",
        ),
        (
            ['model.rotary.yarn={"factor": 2, "original_length": 64, "beta_slow": 32}'],
            "beta_fast (32.0) must be greater than beta_slow (32.0)",
        ),
        (['model.rotary.yarn={"factor": 0.5, "original_length": 64}'], "factor (0.5) must be at least 1"),
        (["model.ffn_hidden_per_layer=[8]"], "has 1 entries for model.num_layers=2"),
        (["model.moe.first_dense=2"], "first_dense (2) must be less than model.num_layers (2)"),
        (["model.moe.every=3"], "every (3) must be at most the 2 layers after first_dense (0 of 2)"),
        (["model.moe.shared_gate=true"], "shared_gate (true) needs a shared expert"),
        (["model.moe.top_k=1"], "model.moe.router: gate 'selected' with top_k=1"),
        (["model.vocab_size=256"], "model.vocab_size (256) must be at least 257"),
        (["data.tokenizer=bpe", "data.tokenizer.vocab_size=300"], "model.vocab_size (257) must be at least 300"),
        (
            ["train.micro_rows=3"],
            "train.batch_rows (4) must be divisible by micro_rows (3): use micro_rows=2 or batch_rows=3",
        ),
        (
            ["train.schedule=wsd", "train.schedule.warmup_steps=1", "train.schedule.decay_steps=2"],
            "plus decay_steps (2), 3, must be at most train.steps (2)",
        ),
        (["checkpoint.keep_best=true"], "evaluation.every_steps is 0"),
        (["logging.record_routing=true", "logging.replay_routing=x"], "exclude each other"),
        (["model.moe=null", "logging.record_routing=true"], "needs expert layers"),
    ],
)
def test_a_contradiction_states_rule_numbers_and_way_out(plain, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(plain, overrides)
    assert message in str(caught.value)


LATENT = [
    "model.attention=latent",
    *(f"model.attention.{f}" for f in ("num_heads=2", "kv_rank=8", "nope_dim=4", "value_dim=4")),
]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.attention.rope_dim=3"], "rope_dim (3) must be even: use rope_dim=4"),
        (["model.attention.rope_dim=4", "model.rotary.fraction=0.5"], "fraction (0.5) must be 1 with latent attention"),
    ],
)
def test_latent_attention_has_rules_of_its_own(plain, overrides, message):
    with pytest.raises(ConfigError) as caught:
        load(plain, [*LATENT, *overrides])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "micro", "world", "way_out"),
    [(4, 4, 1, None), (8, 2, 4, None), (8, 4, 4, "batch_rows=16, or train.micro_rows=2"), (8, 2, 3, "batch_rows=6")],
)
def test_a_batch_must_spread_over_the_processes(tmp_path, rows, micro, world, way_out):
    run = tiny_run(tmp_path, f"train.batch_rows={rows}", f"train.micro_rows={micro}")
    if way_out is None:
        resolve(run, world)
        return
    with pytest.raises(ConfigError) as caught:
        resolve(run, world)
    assert f"train.batch_rows ({rows})" in str(caught.value)
    assert f"({world})" in str(caught.value)
    assert way_out in str(caught.value)


def test_the_way_out_leads_out(tmp_path):
    resolve(tiny_run(tmp_path, "train.batch_rows=16", "train.micro_rows=4"), 4)
    resolve(tiny_run(tmp_path, "train.batch_rows=8", "train.micro_rows=2"), 4)


def test_slots_know_every_field_of_a_run():
    slots = fields_of(Run)
    assert slots["model"].config is not None
    assert isinstance(fields_of(slots["model"].config)["moe"], Slot)
    assert fields_of(slots["model"].config)["moe"].optional
    assert set(fields_of(slots["model"].config)["attention"].members) == {"grouped_query", "latent"}
    assert fields_of(fields_of(slots["model"].config)["moe"].config)["router"].is_router


def test_threads_that_load_one_recipe_all_get_it_whole(tmp_path):
    recipe = tmp_path / "slow.py"
    recipe.write_text(
        "import time\ntime.sleep(0.3)\nfrom tiny_runs import tiny_run\nfrom pathlib import Path\n\n"
        "def run():\n    return tiny_run(Path(__file__).parent)\n"
    )
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(load, [recipe] * 4))
    assert len(runs) == 4 and all(run == runs[0] for run in runs)

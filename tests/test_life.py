"""moe/experiments/life and its page: the rule against known figures, networks against torch's convolutions, proofs against
boards played cell by cell, Wilson's interval against scipy's, claims against results made up for them."""

import json
import random

import pytest
import torch
from scipy import stats
from torch import nn

from moe.analysis.life_page import write_page
from moe.analysis.life_results import claims, read_results
from moe.analysis.shares import wilson
from moe.cli import main
from moe.config.life import ExpertArm, Flips, Growing, Life, Pruning
from moe.config.load import dump, load, load_as
from moe.config.schema import MoE
from moe.errors import ConfigError, UserError
from moe.experiments.life.exact import _two_steps, first_error, is_exact, right_of_512
from moe.experiments.life.laboratory import run
from moe.experiments.life.networks import Shape, by_hand, first_values, logits, split
from moe.experiments.life.pruning import kept_after, prune, shuffled
from moe.experiments.life.rule import all_neighbourhoods, next_cell, play
from moe.experiments.life.training import Task, train
from moe.routers.topk import Config as TopK

TASK = Task(side=6, boards=4, density=0.4, updates=30, lr=0.01)


def cell_by_cell(board: list[list[int]]) -> list[list[int]]:
    """One step of the game on a torus, as its rules are told."""
    n = len(board)
    after = [[0] * n for _ in range(n)]
    for r in range(n):
        for c in range(n):
            living = sum(board[(r + a) % n][(c + b) % n] for a in (-1, 0, 1) for b in (-1, 0, 1) if (a, b) != (0, 0))
            after[r][c] = int(living in (2, 3)) if board[r][c] else int(living == 3)
    return after


def test_a_glider_moves_one_cell_down_and_right_in_four_steps():
    board = torch.zeros(8, 8)
    for row, column in ((0, 1), (1, 2), (2, 0), (2, 1), (2, 2)):
        board[row, column] = 1
    assert torch.equal(play(board.view(1, -1), 4).view(8, 8), board.roll((1, 1), (0, 1)))


def test_the_rule_is_the_game_as_it_is_told():
    draw = random.Random(0)
    boards = [[[draw.randint(0, 1) for _ in range(7)] for _ in range(7)] for _ in range(20)]
    told = torch.tensor([cell_by_cell(board) for board in boards]).float()
    assert torch.equal(play(torch.tensor(boards).float().flatten(1), 1), told.flatten(1))


def test_the_solution_by_hand_is_right_everywhere():
    assert Shape(1, 1).parameters == len(by_hand(1)) == 25
    assert Shape(2, 1).parameters == len(by_hand(2)) == 48
    assert right_of_512(Shape(1, 1), by_hand(1).unsqueeze(0)).tolist() == [512]
    assert first_error(Shape(2, 1), by_hand(2)) is None


def test_all_but_two_parameters_of_the_solution_are_needed():
    shape = Shape(1, 1)
    without_QP = by_hand(1).repeat(25, 1).fill_diagonal_(0.0)
    spare = (right_of_512(shape, without_QP) == 512).nonzero().flatten().tolist()
    # the second filter need not see the cell itself, and any output above 0 can mean alive
    assert spare == [9, 24]
    both = by_hand(1)
    both[spare] = 0.0
    assert right_of_512(shape, both.unsqueeze(0)).tolist() == [512]


def test_a_network_is_torchs_convolutions():
    shape, side = Shape(2, 3), 6
    value_QP = first_values(shape, [1, 2])
    board_QNC = (torch.rand(2, 5, side * side) < 0.4).float()
    said_QT = logits(shape, split(shape, value_QP), board_QNC)
    for q in range(2):
        x, parts = board_QNC[q].view(5, 1, side, side), split(shape, value_QP[q : q + 1])
        for i, (cells, inputs, filters) in enumerate(shape.layers):
            weight = parts[2 * i][0].view(cells, inputs, filters)
            if cells == 9:
                layer = nn.Conv2d(inputs, filters, 3, padding=1, padding_mode="circular")
            else:
                layer = nn.Conv2d(inputs, filters, 1)
            with torch.no_grad():
                layer.weight.copy_(weight.permute(2, 1, 0).view_as(layer.weight))
                layer.bias.copy_(parts[2 * i + 1].view(-1))
                x = layer(x) if i == len(shape.layers) - 1 else layer(x).relu()
        torch.testing.assert_close(said_QT[q], x.flatten(), rtol=0, atol=1e-5)


def centre_after_two_steps(bits: int) -> int:
    board = [[0] * 9 for _ in range(9)]
    for i in range(25):
        board[2 + i // 5][2 + i % 5] = bits >> i & 1
    return cell_by_cell(cell_by_cell(board))[4][4]


def test_the_table_of_two_steps_is_the_game_played_twice():
    draw = random.Random(1)
    for _ in range(300):
        bits = draw.getrandbits(25)
        rows = [bits >> 5 * i & 31 for i in range(5)]
        table = _two_steps()[rows[0] + 32 * rows[4]]
        assert bool(table[1024 * rows[1] + 32 * rows[2] + rows[3]]) == bool(centre_after_two_steps(bits))


def test_an_error_in_few_of_the_two_to_the_25_is_found():
    shape, broken = Shape(2, 1), by_hand(2)
    # a second step that no longer sees one cell is wrong where that cell decides
    broken[23] = 0.0
    broken[24] = 0.0
    bits = first_error(shape, broken)
    assert bits is not None
    board = torch.zeros(1, 81)
    for i in range(25):
        board[0, (2 + i // 5) * 9 + 2 + i % 5] = bits >> i & 1
    said = logits(shape, split(shape, broken.unsqueeze(0)), board.unsqueeze(0))[0, 40] > 0
    assert bool(said) != bool(centre_after_two_steps(bits)), "the neighbourhood it names is wrong"
    assert is_exact(shape, torch.stack([by_hand(2), broken]), side=6, seed=0).tolist() == [True, False]


def test_networks_trained_together_are_those_trained_alone():
    shape, seeds = Shape(1, 2), [3, 4, 5]
    together = train(shape, first_values(shape, seeds), seeds, TASK)
    assert torch.equal(together, train(shape, first_values(shape, seeds), seeds, TASK)), "and again the same"
    assert not torch.equal(together[0], together[1])
    for q, seed in enumerate(seeds):
        alone = train(shape, first_values(shape, [seed]), [seed], TASK)
        torch.testing.assert_close(together[q], alone[0], rtol=1e-4, atol=1e-5)


def test_pruning_keeps_the_largest_and_the_rest_stays_zero():
    spec = Pruning(width=2, networks=3, rounds=2, final_share=0.25, updates=20)
    rows = list(prune(spec, TASK, [1, 2, 3]))
    assert kept_after(53, 0.25, 2) == [53, 26, 13]
    assert [(row["kept"], row["arm"]) for row, _ in rows] == [
        (53, "magnitude"),
        *((26, arm) for arm in ("magnitude", "random mask", "new first values")),
        *((13, arm) for arm in ("magnitude", "random mask", "new first values")),
    ]
    full_QP, half_QP = rows[0][1], rows[1][1]
    assert all((value_QP != 0).sum(1).tolist() == [row["kept"]] * 3 for row, value_QP in rows)
    for q in range(3):
        kept = half_QP[q] != 0
        assert full_QP[q][kept].abs().min() >= full_QP[q][~kept].abs().max()
        assert (rows[4][1][q][~kept] == 0).all(), "what is gone stays gone"
    assert torch.equal(half_QP != 0, rows[3][1] != 0), "new first values under the same mask"
    assert not torch.equal(half_QP != 0, rows[2][1] != 0)


def test_a_random_mask_has_as_many_in_every_tensor():
    shape = Shape(1, 2)
    keep_QP = (torch.rand(4, shape.parameters) < 0.4).float()
    mixed_QP = shuffled(shape, keep_QP, 0)
    assert not torch.equal(mixed_QP, keep_QP)
    for mine, theirs in zip(mixed_QP.split(shape.sizes, 1), keep_QP.split(shape.sizes, 1), strict=True):
        assert torch.equal(mine.sum(1), theirs.sum(1))


@pytest.mark.parametrize("successes, trials", [(0, 32), (3, 64), (16, 32), (64, 64), (1, 1)])
def test_wilson_is_scipys(successes, trials):
    theirs = stats.binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    mine = wilson(successes, trials)
    assert (mine.low, mine.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_wilson_needs_trials():
    with pytest.raises(UserError, match="found 0 of 0"):
        wilson(0, 0)


def tiny() -> Life:
    """Every kind of part, in about a second."""
    layer = MoE(num_experts=2, top_k=1, expert_hidden=1, router=TopK(gate="full"))
    return Life(
        board=5,
        boards=2,
        growing=(Growing(steps=1, widths=(1, 2), networks=3, updates=20),),
        pruning=(Pruning(width=2, networks=3, rounds=2, updates=20),),
        flips=(Flips(counts=(0, 1), networks=2, updates=5),),
        experts=(ExpertArm(label="two", moe=layer, layers=2, updates=30),),
    )


def test_the_laboratory_goes_on_where_it_stopped_and_repeats_itself(tmp_path):
    said: list[str] = []
    results = run(tiny(), tmp_path / "a", said.append)
    assert len(said) == 5 and not any("reused" in line for line in said)
    first = results.read_bytes()
    (tmp_path / "a/flips-0.json").unlink()
    again: list[str] = []
    assert run(tiny(), tmp_path / "a", again.append).read_bytes() == first
    assert [line.split(":")[0] for line in again if "reused" not in line] == ["flips-0"]
    changed: list[str] = []
    run(load_as(Life, tiny(), ["density=0.5"], notices=None), tmp_path / "a", changed.append)
    assert not any("reused" in line for line in changed), "other boards, other results"
    rows = json.loads(first)["parts"][2]["rows"]
    assert [row["flipped"] for row in rows] == [0, 1] and rows[0]["right"] == [512, 512]
    page = write_page(results, tmp_path / "page").read_text("utf-8")
    assert "L(1, 2) was not pruned" in page, "20 updates teach nobody"
    assert "| L(1, 2) | 53 |" in page and (tmp_path / "page/life.png").stat().st_size > 10_000


def made_up(tmp_path, narrow: int, wide: int, magnitude: int, chance: int):
    """Results of 32 networks with these successes."""
    growing = [
        {
            "name": f"growing-1-{m}",
            "settings": {"steps": 1, "width": m},
            "exact": [q < k for q in range(32)],
            "accuracy": [],
        }
        for m, k in ((1, narrow), (8, wide))
    ]
    full = [512] * 32
    rows = [{"round": 0, "kept": 305, "arm": "magnitude", "right": full}] + [
        {"round": 1, "kept": 30, "arm": arm, "right": [512] * k + [400] * (32 - k)}
        for arm, k in (("magnitude", magnitude), ("random mask", chance), ("new first values", magnitude))
    ]
    pruning = {"name": "pruning-8", "settings": {"width": 8}, "parameters": 305, "rows": rows, "smallest": None}
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"life": dump(tiny()), "parts": [*growing, pruning]}))
    return {claim.text: claim for claim in claims(read_results(path))}


def test_claims_follow_the_numbers(tmp_path):
    found = made_up(tmp_path, narrow=2, wide=30, magnitude=20, chance=2)
    assert found["Training rarely finds the rule in the network that just suffices, n = 1"].verdict == "replicated"
    assert found["Many times the parameters make it more likely, n = 1"].verdict == "replicated"
    assert found["Kept parameters of L(1, 8) beat as many at random"].verdict == "replicated"
    ticket = found["Kept parameters of L(1, 8) beat as many the same, with new first values (a lottery ticket)"]
    assert ticket.verdict == "undecided"
    assert "20/32" in found["A large winner, L(1, 8), can be pruned to a tenth at equal accuracy"].here
    found = made_up(tmp_path, narrow=30, wide=2, magnitude=0, chance=0)
    assert found["Training rarely finds the rule in the network that just suffices, n = 1"].verdict == "contradicted"
    assert found["Many times the parameters make it more likely, n = 1"].verdict == "contradicted"
    assert found["A large winner, L(1, 8), can be pruned to a tenth at equal accuracy"].verdict == "not shown"


def test_results_that_are_none_are_refused(tmp_path):
    (tmp_path / "results.json").write_text("[]")
    with pytest.raises(UserError, match="moe life RECIPE"):
        read_results(tmp_path / "results.json")


def test_the_command_writes_the_page(tmp_path, capsys):
    small = {"growing": [{"steps": 1, "widths": [1], "networks": 2, "updates": 5}]}
    (tmp_path / "life.json").write_text(json.dumps(small))
    assert main(["life", str(tmp_path / "life.json"), "board=6", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out/life.md")
    assert json.loads((tmp_path / "out/results.json").read_text())["life"]["board"] == 6


def test_a_wrong_setting_is_told(tmp_path):
    recipe = "recipes/life.py"
    with pytest.raises(
        ConfigError, match=r"run\(\) must return a moe\.config\.schema\.Run, and returned Life: moe life takes"
    ):
        load(recipe)
    with pytest.raises(
        ConfigError, match=r"must return a moe\.config\.life\.Life, and returned Run: moe train takes it"
    ):
        load_as(Life, "recipes/smoke.py", notices=None)
    with pytest.raises(ConfigError, match=r"pruning\.0\.final_share must be a number greater than 0 and less than 1"):
        load_as(Life, recipe, ["pruning.0.final_share=1"], notices=None)
    wrong = load_as(Life, recipe, ["experts.0.moe.top_k=2", "experts.0.label=dense, 2 hidden"], notices=None)
    with pytest.raises(ConfigError, match=r"experts\.0\.moe\.top_k \(2\) must be at most .* different labels"):
        run(wrong, tmp_path, print)
    assert not list(tmp_path.iterdir()), "refused before any work"


@pytest.mark.full
def test_width_decides_whether_the_rule_is_learnt():
    task = Task(side=8, boards=8, density=0.38, updates=800, lr=0.01)
    found = {}
    for width in (1, 8):
        shape = Shape(1, width)
        value_QP = train(shape, first_values(shape, list(range(16))), list(range(16)), task)
        found[width] = wilson(int((right_of_512(shape, value_QP) == 512).sum()), 16)
    assert found[8].above(found[1])


def test_all_neighbourhoods_are_there_once():
    nine = all_neighbourhoods()
    assert len({tuple(row) for row in nine.tolist()}) == 512
    # three of nine, or four with the cell: 84 + 56
    assert int(next_cell(nine).sum()) == 140

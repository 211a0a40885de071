"""Stages of the data in the run file: what they mean, what they may not say, and what of them may change."""

from __future__ import annotations

import time

import pytest
from patience import processor
from test_changes import in_force
from test_refusals import RUN, load

from megatron_ttl.config.changes import InForce, compare, refusals
from megatron_ttl.config.stages import name_of, stages_of
from megatron_ttl.errors import ConfigError

PLAIN = 'sources = [{ prefix = "data/pt", weight = 1.0 }]'
TWO = 'sources = [{ prefix = "data/pt/" }, { prefix = "data/instruct_2", name = "instruct" }]\n'


def settings(folder, stages, sources=TWO, overrides=()):
    assert PLAIN in RUN
    return load(folder, text=RUN.replace(PLAIN, sources + stages), overrides=overrides)


def stage(weights, until=None):
    return "[[data.stages]]\n" + (f"until_tokens = {until}\n" if until else "") + f"weights = {{ {weights} }}\n"


FIRST, SECOND = stage("pt = 0.6, instruct = 0.4", 6_400), stage("pt = 0, instruct = 1")


def test_stages_are_weights_in_the_order_of_the_sources(tmp_path):
    """By name, which is the last part of the prefix where none is given; without stages, one of the sources' weights."""
    data = settings(tmp_path, FIRST + stage("instruct = 3, pt = 1")).run.data
    assert [name_of(source) for source in data.sources] == ["pt", "instruct"]
    assert stages_of(data) == [(6_400, [0.6, 0.4]), (None, [1.0, 3.0])]
    plain = settings(tmp_path, "", 'sources = [{ prefix = "a/x", weight = 7 }, { prefix = "b/x", weight = 3 }]\n').run.data
    assert stages_of(plain) == [(None, [7.0, 3.0])] and plain.stages == ()
    override = 'data.stages=[{until_tokens=6400, weights={pt=1, instruct=1}}, {weights={pt=1, instruct=0}}]'
    assert stages_of(settings(tmp_path, "", overrides=[override]).run.data) == [(6_400, [1, 1]), (None, [1, 0])]


@pytest.mark.parametrize(("stages", "message"), [
    (stage("pt = 1, instrct = 1"), r"stages\[0\].weights: names \"instrct\"; must be names of sources \(pt, instruct\); did "
                                   "you mean 'instruct'"),
    (stage("pt = 1, instruct = 1, web = 2"), 'names "web"; .*; remove it, or give a source that name'),
    (stage("pt = 1"), "says nothing of instruct; must give every source a weight; add it, 0 where"),
    (stage("pt = 0, instruct = 0"), "are all 0; one at least must be above"),
    (stage("pt = -1, instruct = 2"), 'gives "pt" -1; must be 0 or more'),
    (stage("pt = 1, instruct = nan"), "finite number"),
    (stage('pt = "1", instruct = 1'), r"stages\[0\].weights: is .*; must be a table of numbers"),
    ("[[data.stages]]\nuntil_tokens = 640\n", r"stages\[0\].weights: is missing; must be a table of numbers"),
    (FIRST.replace("6400", "6401") + SECOND, "6,401 is not a multiple of sequence_length 64; .* 6,400 or 6,464"),
    (FIRST + FIRST + SECOND, r"stages\[1\].until_tokens: is 6,400, and the stage before it ends at 6,400; .* ascend"),
    (stage("pt = 1, instruct = 1") + SECOND, r"stages\[0\].until_tokens: is missing; only the last stage"),
    (FIRST, "is 6,400, and the run has 51,200 tokens; the last stage must reach the end"),
    (FIRST.replace("until_tokens", "until_token") + SECOND, "did you mean 'data.stages..*until_tokens'"),
    (stage("pt = 1, instruct = 0"), r'sources\[1\]: "instruct" has weight 0 in every stage; must be drawn in one'),
])
def test_a_faulty_stage_is_refused(tmp_path, stages, message):
    """With what it must be and what to do."""
    with pytest.raises(ConfigError, match=message) as error:
        settings(tmp_path, stages)
    assert len(error.value.faults) == 1 and error.value.faults[0].count(";") >= 2


def test_all_faults_of_stages_come_at_once(tmp_path):
    """Names twice, weights in both places, an end that goes back, weights of nobody."""
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, stage("pt = 1", 6_400) + stage("pt = 1, no = 1", 64) + stage("pt = 1"),
                 'sources = [{ prefix = "a/pt", weight = 2 }, { prefix = "b/pt" }]\n')
    keys = [fault.split(": ")[1] for fault in error.value.faults]
    assert keys == ["data.sources[0].name", "data.sources[0].weight", "data.sources[1].name", "data.stages[1].weights",
                    "data.stages[1].until_tokens"]


def test_thousands_of_stages_and_names_are_refused_quickly(tmp_path):
    """A file as large as may be read, of names that are nearly right."""
    many = "sources = [" + ", ".join(f'{{prefix="s{i:04}"}}' for i in range(1_500)) + "]\n"
    wrong = stage(", ".join(f"t{i:04}=1" for i in range(2_500)), 64) + "".join(stage("") for _ in range(1_500))
    began = time.process_time()
    with pytest.raises(ConfigError) as error:
        settings(tmp_path, wrong, many)
    assert time.process_time() - began < processor(3) and len(str(error.value)) < 100_000


def told(folder, before, now, read, allow=(), sources=TWO, now_sources=None, overrides=()):
    """Return the verdict on each change of a run that has read so many tokens."""
    old = in_force(settings(folder, before, sources), {})
    later = settings(folder, now, now_sources or sources, overrides)
    found = compare(InForce(old.run, old.profile, {}, read), in_force(later, {}), allow)
    assert bool(refusals(found, later)) == any(change.refused for change in found)
    return {change.field: "confirmed" if change.confirmed else change.verdict for change in found}


THIRD = stage("pt = 1, instruct = 1")
EARLIER = stage("pt = 0.6, instruct = 0.4", 3_200)


@pytest.mark.parametrize(("before", "now", "read", "verdict"), [
    (FIRST + SECOND, FIRST + SECOND, 0, None), (FIRST + SECOND, FIRST + SECOND, None, None),
    (FIRST + SECOND, FIRST + THIRD, 6_399, "confirm"), (FIRST + SECOND, FIRST + THIRD, 6_400, "confirm"),
    (FIRST + SECOND, FIRST + THIRD, 6_401, "forbidden"), (FIRST + SECOND, FIRST + THIRD, None, "forbidden"),
    (FIRST + SECOND, THIRD, 1, "forbidden"), (FIRST + SECOND, THIRD, 0, "confirm"),
    (FIRST + SECOND, EARLIER + SECOND, 3_200, "confirm"), (FIRST + SECOND, EARLIER + SECOND, 3_201, "forbidden"),
    (EARLIER + SECOND, FIRST + SECOND, 3_200, "confirm"), (EARLIER + SECOND, FIRST + SECOND, 3_201, "forbidden"),
    # The run of record ends after 51,200 tokens.
    (FIRST + SECOND, FIRST + stage("pt = 0, instruct = 1", 51_200) + THIRD, 51_200, "allowed"),
    (FIRST + SECOND, FIRST + stage("pt = 0, instruct = 1", 51_136) + THIRD, 51_136, "confirm"),
    (FIRST + SECOND, FIRST + stage("pt = 0, instruct = 2"), 9_999, "allowed"),
    (FIRST + SECOND, FIRST + stage("pt = 0, instruct = 1", 99_968), 9_999, "allowed"),
])
def test_the_past_stays_and_the_future_is_confirmed(tmp_path, before, now, read, verdict):
    """What was read may not be another; what was planned is confirmed; what comes after the planned end is free."""
    assert told(tmp_path, before, now, read) == ({} if verdict is None else {"data.stages": verdict})
    confirmed = told(tmp_path, before, now, read, allow=["data.stages"])
    assert confirmed.get("data.stages") == ("confirmed" if verdict == "confirm" else verdict)


def test_the_refusal_says_where_a_new_stage_can_begin(tmp_path):
    old, now = in_force(settings(tmp_path, FIRST + SECOND), {}), settings(tmp_path, FIRST + THIRD)
    (fault,) = refusals(compare(InForce(old.run, old.profile, {}, 12_800), in_force(now, {})), now)
    assert "r.toml: data.stages: was [" in fault and "has read 12,800 tokens: let the stage that it is in end there" in fault


WEIGHED = 'sources = [{ prefix = "data/pt/", weight = 3 }, { prefix = "data/instruct_2", name = "instruct", weight = 2 }]\n'


def test_a_run_without_stages_may_get_some(tmp_path):
    """Its weights are a first stage; a source may be added that nothing was drawn from, and none may go."""
    begin = stage("pt = 0.6, instruct = 0.4", 6_400)
    assert told(tmp_path, "", begin + SECOND, 6_400, sources=WEIGHED, now_sources=TWO) == {"data.stages": "confirm"}
    assert told(tmp_path, "", begin + SECOND, 6_464, sources=WEIGHED, now_sources=TWO) == {"data.stages": "forbidden"}
    assert told(tmp_path, "", THIRD, 64) == {"data.stages": "allowed"}
    three = TWO.replace(" }]", ' }, { prefix = "data/web" }]')
    added = stage("pt = 0.6, instruct = 0.4, web = 0", 6_400) + stage("pt = 0, instruct = 1, web = 1")
    for read, verdicts in ((6_400, ("confirm", "allowed")), (6_464, ("forbidden", "forbidden"))):
        found = told(tmp_path, begin + SECOND, added, read, now_sources=three)
        assert (found.pop("data.stages"), found.pop("data.sources")) == verdicts and not found
    removed = told(tmp_path, added, begin + SECOND, 64, sources=three, now_sources=TWO)
    assert removed["data.sources"] == "forbidden"
    renamed = told(tmp_path, FIRST + SECOND, (FIRST + SECOND).replace("instruct", "chat"), 9_999,
                   now_sources=TWO.replace('"instruct"', '"chat"'))
    assert renamed == {"data.stages": "allowed", "data.sources[1].name": "allowed"}
    swapped = told(tmp_path, FIRST + SECOND, FIRST + SECOND, 9_999, now_sources='sources = [{ prefix = "data/instruct_2", '
                   'name = "pt" }, { prefix = "data/pt", name = "instruct" }]\n')
    assert swapped["data.sources[0].prefix"] == "forbidden"


def test_settings_of_record_that_are_no_stages_are_no_match(tmp_path):
    """What a stranger wrote into settings.json."""
    now = settings(tmp_path, FIRST + SECOND)
    for stages in ([{"weights": 3}], "x", [{"weights": {"pt": 1}, "more": 1}], {"a": 1}):
        old = in_force(now, {})
        old.run["data"]["stages"] = stages
        assert {change.verdict for change in compare(InForce(old.run, None, {}, 0), in_force(now, {}))} == {"forbidden"}

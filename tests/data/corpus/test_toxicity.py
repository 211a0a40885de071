"""Toxicity: the scores are scikit-learn's, the threshold is brute force's, and a damaged classifier is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_ttl.data.corpus import toxicity, toxicity_training
from megatron_ttl.data.corpus.document import Document
from megatron_ttl.data.corpus.toxicity import FEATURES, NGRAMS, ToxicityClassifier, read_record, toxicity_step
from megatron_ttl.data.corpus.toxicity_training import (
    DIALECT_WARNING, LabelNames, choose_threshold, fit_sigmoid, measure, read_labelled, split, threshold_table,
    train_toxicity,
)
from megatron_ttl.errors import ConfigError, DataError

SUBJECTS = "o vizinho|a professora|esse político|o time|a cantora|meu chefe|o motorista|aquela loja|o juiz".split("|")
PRAISE = "é muito gentil|cozinha bem|trabalha com calma|canta bonito|explica direito|chegou cedo|ajuda todo mundo".split("|")
INSULTS = "é um idiota|é um lixo nojento|não passa de um imbecil|devia sumir, palhaço|só fala asneira".split("|")
ENDS = "de novo|hoje|na feira|lá em casa|desde março|e pronto|com certeza|no ônibus|outra vez, viu|às quintas".split("|")


def comments(count: int, seed: int = 0, noise: float = 0.1) -> list[dict[str, object]]:
    """Make labelled comments; some of the labels are wrong, as people's are."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        toxic = draw.random() < 0.5
        text = f"{draw.choice(SUBJECTS)} {draw.choice(INSULTS if toxic else PRAISE)} {draw.choice(ENDS)} {number}"
        rows.append({"text": text, "label": int(toxic != (draw.random() < noise))})
    return rows


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def train(tmp_path: Path, rows: list[dict[str, object]], **options: object) -> dict[str, object]:
    return train_toxicity([str(write(tmp_path / "rows.jsonl", rows))], tmp_path / "c", **{"recall": 0.9, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("toxicity")
    train(place, comments(400))
    return place / "c"


@pytest.fixture(scope="module")
def classifier(folder) -> ToxicityClassifier:
    return ToxicityClassifier.load(folder)


def sklearn_margin(text: str, weights: np.ndarray) -> float:
    from sklearn.feature_extraction.text import HashingVectorizer

    vectors = HashingVectorizer(analyzer="char_wb", ngram_range=NGRAMS, n_features=FEATURES, alternate_sign=False, norm="l1")
    return (vectors.transform([text]) @ weights.astype(np.float64)).item()


def stored_weights(folder: Path) -> np.ndarray:
    from safetensors.numpy import load_file

    return load_file(folder / toxicity.WEIGHTS)["weights"]


WORD = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(words=st.lists(WORD, min_size=1, max_size=20))
def test_a_short_text_has_the_score_that_scikit_learn_gives_it(folder, classifier, words):
    text = " ".join(words)
    assume(text.split() and len(text.lower()) < toxicity.BLOCK)
    assert classifier.margin(text) == pytest.approx(sklearn_margin(text, stored_weights(folder)), abs=1e-9)


def test_a_long_text_has_the_score_of_its_worst_window(folder, classifier):
    draw, weights = random.Random(1), stored_weights(folder)
    for _ in range(5):
        words = " ".join(str(row["text"]) for row in comments(60, draw.randint(2, 99))).split()
        starts = np.cumsum([0] + [len(word) + 1 for word in words])
        blocks = [[word for word, start in zip(words, starts, strict=False) if start // 500 == block]
                  for block in range(int(starts[-2]) // 500 + 1)]
        wanted = max(sklearn_margin(" ".join(one + two), weights) for one, two in zip(blocks, blocks[1:], strict=False))
        assert classifier.margin("\n".join(words)) == pytest.approx(wanted, abs=1e-9)
    clean = " ".join(str(row["text"]) for row in comments(600, 5, noise=0) if not row["label"])
    page = " ".join(str(row["text"]) for row in comments(60, 6, noise=0) if row["label"])
    half = clean.index(" ", len(clean) // 2)
    assert classifier.probability(clean) < 0.2 < 0.8 < classifier.probability(f"{clean[:half]} {page}{clean[half:]}")


def test_a_score_does_not_depend_on_what_was_scored_before(folder, classifier, monkeypatch):
    texts = [str(row["text"]) for row in comments(80, 7)] + ["", " \n", "x" * 5000, "Ação! " * 400, "\u0130\ud7ff 😡"]
    wanted = [classifier.probability(text) for text in texts]
    assert [classifier.probability(text) for text in texts[::-1]][::-1] == wanted
    monkeypatch.setattr(toxicity, "_REMEMBERED_WORDS", 7)
    monkeypatch.setattr(toxicity, "_WORDS_AT_ONCE", 2)
    forgetful = ToxicityClassifier.load(folder)
    assert [forgetful.probability(text) for text in texts] == wanted
    assert all(0 <= value <= 1 and value == round(value, 4) for value in wanted)


def test_the_step_notes_and_drops_nothing(folder, classifier):
    step = toxicity_step(folder)
    for row in comments(20, 8):
        document = Document(str(row["text"]), "s", "CC0", "a.jsonl", 1, notes={"language": "pt"})
        assert step(document) == document.with_note("toxicity", classifier.probability(document.text))


def test_the_same_input_gives_the_same_bytes_in_any_order(tmp_path, folder):
    rows = comments(400)
    for name, given_rows in (("again", rows), ("shuffled", random.Random(0).sample(rows, len(rows)))):
        (tmp_path / name).mkdir()
        train(tmp_path / name, given_rows)
    assert {path.name: path.read_bytes() for path in (tmp_path / "again" / "c").iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()}
    parts = [split(read_labelled([str(tmp_path / name / "rows.jsonl")], LabelNames())[0], 0)
             for name in ("again", "shuffled")]
    for part in toxicity_training.PARTS:
        assert sorted(parts[0][part].texts) == sorted(parts[1][part].texts)
    other = split(read_labelled([str(tmp_path / "again" / "rows.jsonl")], LabelNames())[0], 1)
    assert set(other["test"].texts) != set(parts[0]["test"].texts)


def test_a_text_is_in_one_part_once(tmp_path):
    rows = comments(300)
    repeated = [{**row, "text": f"  {str(row['text']).upper()} "} for row in rows[:50]]
    contradicted = [{**row, "label": 1 - int(str(row["label"]))} for row in rows[50:60]]
    labelled, left_out = read_labelled([str(write(tmp_path / "a.jsonl", rows + repeated + contradicted))], LabelNames())
    assert left_out == {"repeated": 60, "with_both_labels": 10} and len(labelled.texts) == 290
    parts = split(labelled, 3)
    assert sum((part.texts for part in parts.values()), []) != labelled.texts
    assert sorted(sum((part.texts for part in parts.values()), [])) == sorted(labelled.texts)
    shares = [len(parts[name].texts) / 290 for name in toxicity_training.PARTS]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.1)
    truth = {row["text"]: bool(row["label"]) for row in rows}
    assert all(truth[text] == toxic for part in parts.values() for text, toxic in zip(part.texts, part.toxic, strict=True))


SCORES = [round(step / 20, 4) for step in range(21)]
SCORED = st.lists(st.tuples(st.booleans(), st.sampled_from(SCORES)), min_size=2, max_size=40)


@settings(max_examples=150, deadline=None)
@given(SCORED, st.sampled_from([0.3, 0.5, 0.75, 0.9, 1.0]))
def test_thresholds_agree_with_brute_force(rows, wanted):
    toxic, scores = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    assume(toxic.any() and not toxic.all())

    def precision_and_recall(threshold: float) -> tuple[float | None, float]:
        flagged = [truth for truth, score in rows if score >= threshold]
        return (sum(flagged) / len(flagged) if flagged else None), sum(flagged) / int(toxic.sum())

    for row in threshold_table(toxic, scores):
        precision, recall = precision_and_recall(row["threshold"])
        assert row["flagged"] == sum(score >= row["threshold"] for _, score in rows)
        assert row["precision"] == (None if precision is None else round(precision, 4))
        assert row["recall"] == round(recall, 4)
    precise = [score for score in sorted(set(scores)) if precision_and_recall(score)[0] >= wanted]
    if precise:
        found = choose_threshold(toxic, scores, wanted, None)
        assert (found.value, found.reached) == pytest.approx((precise[0], precision_and_recall(precise[0])[0]))
    else:
        with pytest.raises(DataError, match=f"--precision: is {wanted}; the calibration part reaches at most"):
            choose_threshold(toxic, scores, wanted, None)
    complete = max(score for score in set(scores) if precision_and_recall(score)[1] >= wanted)
    assert choose_threshold(toxic, scores, None, wanted).value == complete


def test_the_figures_are_those_of_scikit_learn_and_the_intervals_cover_the_truth():
    from sklearn import metrics

    draw = np.random.default_rng(4)
    covered = 0
    for trial in range(8):
        toxic = draw.random(150) < 0.4
        scores = np.round(np.clip(draw.normal(0.4 + 0.2 * toxic, 0.2), 0, 1), 2)
        found, flagged = measure(toxic, scores, 0.5, trial), scores >= 0.5
        wanted = {"accuracy": metrics.accuracy_score(toxic, flagged), "precision": metrics.precision_score(toxic, flagged),
                  "recall": metrics.recall_score(toxic, flagged), "f1": metrics.f1_score(toxic, flagged),
                  "auroc": metrics.roc_auc_score(toxic, scores)}
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-4)
        assert all(found[f"{name}_95"][0] <= found[name] <= found[f"{name}_95"][1] for name in wanted)
        covered += found["auroc_95"][0] <= 0.7602 <= found["auroc_95"][1]  # of normals a sigma apart, clipped a little
    assert covered >= 5
    assert measure(np.array([True, False]), np.array([0.1, 0.1]), 0.9, 0)["precision"] is None


def test_the_sigmoid_is_the_one_of_scikit_learn():
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.frozen import FrozenEstimator

    class Margins(ClassifierMixin, BaseEstimator):
        def fit(self, features, labels):
            self.classes_ = np.unique(labels)
            return self

        def decision_function(self, features):
            return features[:, 0]

        def predict(self, features):
            return features[:, 0] > 0

    draw = np.random.default_rng(0)
    for scale in (0.01, 1.0, 50.0):
        toxic = draw.random(120) < 0.5
        margins = scale * (draw.normal(0, 1, 120) + toxic)
        model = CalibratedClassifierCV(FrozenEstimator(Margins().fit(margins[:, None], toxic)), method="sigmoid")
        wanted = model.fit(margins[:, None], toxic).predict_proba(margins[:, None])[:, 1]
        found = fit_sigmoid(margins, toxic)
        assert 1 / (1 + np.exp(-(found.slope * margins + found.offset))) == pytest.approx(wanted, abs=2e-4)
    separated = fit_sigmoid(np.arange(40.0), np.arange(40) >= 20)
    assert 0.5 < 1 / (1 + np.exp(-(separated.slope * 39 + separated.offset))) < 1, "no certainty without a mistake"
    with pytest.raises(DataError, match="the calibration part: its toxic texts do not have the larger scores"):
        fit_sigmoid(-np.arange(40.0), np.arange(40) >= 20)


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_damaged_classifier_is_refused(tmp_path, folder):
    copy = copy_of(folder, tmp_path / "copy")
    draw = random.Random(0)
    for path in copy.iterdir():
        whole = path.read_bytes()
        damaged = [whole[:length] for length in (0, 7, len(whole) // 2, len(whole) - 2)] + [whole + b"x"]
        for _ in range(60):
            place = draw.randrange(len(whole))
            damaged.append(whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1:])
        for payload in damaged:
            path.write_bytes(payload)
            if path.name == toxicity.RECORD and same_values(payload, whole):
                continue
            with pytest.raises(DataError, match=path.name):
                ToxicityClassifier.load(copy)
        path.unlink()
        with pytest.raises(DataError, match=f"{path.name}: cannot be read"):
            ToxicityClassifier.load(copy)
        path.write_bytes(whole)
    assert ToxicityClassifier.load(copy).margin("lixo") == ToxicityClassifier.load(folder).margin("lixo")


def same_values(one: bytes, other: bytes) -> bool:
    """Return whether two JSON texts differ in white space alone."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize(("change", "message"), [
    ({"format": "x"}, "is no classifier's record"), ({"version": 2}, "version: Input should be 1"),
    ({"features": {"ngrams": [1, 3], "places": 8, "longest_word": 9, "block": 5}}, "has other features"),
    ({"calibration": {"slope": -1.0, "offset": 0.0}}, "calibration.slope: Input should be greater than 0"),
    ({"more": 1}, "more: Extra inputs are not permitted"),
])
def test_a_sealed_record_of_another_program_is_refused(tmp_path, folder, change, message):
    copy = copy_of(folder, tmp_path / "copy")
    value = {**json.loads((copy / toxicity.RECORD).read_text()), **change}
    del value["checksum"]
    (copy / toxicity.RECORD).write_text(json.dumps({**value, "checksum": toxicity._seal(value)}))
    with pytest.raises(DataError, match=message):
        ToxicityClassifier.load(copy)


def test_wrong_settings_and_labels_are_named_at_once(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "old").write_text("x")
    with pytest.raises(ConfigError) as caught:
        train(tmp_path, [], precision=2.0, seed=-1, names=LabelNames(toxic=("a", "b"), clean=("b",)))
    assert len(caught.value.faults) == 5
    for said in ("both are given", "--precision: is 2.0", "both name b", "--seed: is -1", "c: exists"):
        assert any(said in fault for fault in caught.value.faults)
    rows = [*comments(3), {"text": "um", "label": "sim"}, {"text": "dois"}, {"corpo": "três", "label": 1}]
    with pytest.raises(DataError, match=r"rows.jsonl:6: no key 'text'"):
        train(tmp_path, rows, overwrite=True)
    with pytest.raises(DataError) as caught:
        train(tmp_path, rows[:5], overwrite=True)
    assert [fault.split(" 'label'")[0].rpartition("/")[2] for fault in caught.value.faults] == [
        "rows.jsonl:4: has label 'sim' under", "rows.jsonl:5: has no key"]
    with pytest.raises(DataError, match="the test part: has . toxic texts; it must have at least 10"):
        train(tmp_path, comments(30), overwrite=True)
    with pytest.raises(DataError, match="do not have the larger scores|--precision: is 0.99"):
        train(tmp_path, comments(400, noise=0.5), overwrite=True, recall=None, precision=0.99)
    assert (tmp_path / "c" / "old").exists(), "what was there stays when nothing better comes"


def test_labels_may_be_names_numbers_and_booleans(tmp_path):
    rows = comments(8, noise=0)
    spelled = [{"corpo": row["text"], "tipo": value} for row, value in
               zip(rows, ["insulto" if row["label"] else "nada" for row in rows], strict=True)]
    names = LabelNames("corpo", "tipo", toxic=("insulto", "ameaça"), clean=("nada",))
    found, _ = read_labelled([str(write(tmp_path / "a.jsonl", spelled))], names)
    assert found.toxic.tolist() == [bool(row["label"]) for row in rows]
    for kind in (bool, float, str):
        found, _ = read_labelled([str(write(tmp_path / "a.jsonl", [{**row, "label": kind(row["label"])} for row in rows]))],
                                 LabelNames())
        assert found.toxic.tolist() == [bool(row["label"]) for row in rows]


def test_without_scikit_learn_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(DataError, match=r"scikit-learn: is not installed; .* pip install 'megatron_ttl\[corpus\]'"):
        ToxicityClassifier.load(folder)


@pytest.mark.slow
def test_the_tool_trains_and_warns(repository, tmp_path):
    source = write(tmp_path / "a.jsonl", comments(400))
    command = [sys.executable, str(repository / "tools" / "train_toxicity.py"), "--input", str(source), "--output",
               str(tmp_path / "c"), "--precision", "0.7", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, f"warning: {DIALECT_WARNING}\n")
    result, record = json.loads(done.stdout), read_record(tmp_path / "c")
    assert (result["threshold"], result["auroc"]) == (record.threshold.value, record.quality["auroc"])
    assert record.training["parts"]["test"]["texts"] == result["test_texts"] > 60
    assert record.training["inputs"][0]["file"] == "a.jsonl" and record.threshold.reached >= 0.7
    again = subprocess.run([*command, "--recall", "0.5"], capture_output=True, text=True, timeout=120)
    assert again.returncode == 2 and "2 faults" in again.stderr and "Traceback" not in again.stderr


@pytest.mark.slow
def test_real_comments_can_be_told_apart(shared_data, tmp_path):
    result = train_toxicity([str(shared_data / "tasks" / "hatebr.sample.jsonl")], tmp_path / "c", precision=0.8)
    assert result["auroc"] > 0.75 and result["auroc_95"][0] > 0.65

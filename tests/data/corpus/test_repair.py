"""What was broken is repaired and noted; what is right stays as it is; personal data is masked where it is asked for."""

from __future__ import annotations

import random
import re

import pytest
from filter_documents import cpu_seconds, document, only
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from patience import processor

from megatron_ttl.data.corpus.filters import build_steps
from megatron_ttl.data.corpus.repair import is_cpf

RIGHT = "Não é “à toa” que o pão – e a maçã – custam R$ 3,50; ação, três, avô, SÃO PAULO, ÀS, Ângela, ½ m², ﬁm"


def steps(**tables):
    built = [step for _, step in build_steps(only("pt", tables))]

    def apply(text):
        result = document(text)
        for step in built:
            result = step(result)
        return result

    return apply


MASK = {"personal_data": {"mask_email": True, "mask_cpf": True}}
REPAIR = {"repair": {"mojibake": True, "line_ends": True, "control_characters": True}}


@pytest.mark.parametrize("encoding", ["latin-1", "windows-1252"])
def test_text_in_the_wrong_encoding_is_repaired_and_shown(encoding):
    right = "O coração não é de pedra, disse a avó, e às três já chovia."
    broken = right.encode("utf-8").decode(encoding)
    result = steps(repair={"mojibake": True})(f"Antes de tudo: está bem.\n{broken}\nfim")
    assert result.text == f"Antes de tudo: está bem.\n{right}\nfim"
    assert result.notes == {"mojibake": {
        "characters": 8, "lines": 1, "before": broken[:80], "after": right[:80]}}


def test_the_snippet_begins_shortly_before_the_repair_and_is_short():
    result = steps(repair={"mojibake": True})("palavra " * 50 + "coraÃ§Ã£o" + " palavra" * 50)
    note = result.notes["mojibake"]
    assert note["before"] == "palavra palavra coraÃ§Ã£o" + (" palavra" * 50)[:55]
    assert note["after"] == "palavra palavra coração" + (" palavra" * 50)[:57]


def test_right_text_stays_as_it_is():
    given_ = document(RIGHT)
    for _, step in build_steps(only("pt", {**REPAIR, **MASK})):
        assert step(given_) is given_


def test_only_the_encoding_is_repaired():
    text = "nÃ£o &amp; “aspas” ﬁ ＷＩＤＥ e\u0301 \x07 a\r\nb"
    assert steps(repair={"mojibake": True})(text).text == text.replace("Ã£", "ã")


def test_line_ends_and_control_characters():
    repair = steps(repair={"line_ends": True, "control_characters": True})
    result = repair("\ufeffa\r\nb\rc\u2028d\x85e\vf\tg\x00h\x9bi\x7f\n")
    assert result.text == "a\nb\nc\nd\ne\nf\tghi\n"
    assert result.notes == {"line_ends": 5, "control_characters": 4}
    assert steps(repair={"control_characters": True})("a\rb\x85c\x07").text == "a\rb\x85c"


def test_mojibake_is_repaired_before_its_control_characters_are_removed():
    result = steps(**REPAIR)("Ã\x80s trÃªs â\x80\x94 nÃ£o")
    assert result.text == "Às três — não"


@pytest.mark.parametrize(("form", "expected"), [("NFC", "não ﬁm²"), ("NFKC", "não fim2")])
def test_normal_forms_are_chosen(form, expected):
    result = steps(repair={"normalization": form})("na\u0303o ﬁm²")
    assert (result.text, result.notes) == (expected, {"normalization": form})


@pytest.mark.parametrize(("text", "masked"), [
    ("escreva a ana.lima+x@exemplo.com.br.", "escreva a [EMAIL]."),
    ("<joão@correio.pt>, (a_b@x-y.org)", "<[EMAIL]>, ([EMAIL])"),
    ("a @ b.com, @usuario, a@b, a@-b.com, x@y.z1, custa 3@5.00", None),
    ("CPF 529.982.247-25 e 52998224725.", "CPF [CPF] e [CPF]."),
    ("123.456.789-09, com resto dez", "[CPF], com resto dez"),
    ("529.982.247-24, 52998224724, 000.000.000-00, 11111111111", None),
    ("1529982247250, 12.529.982.247-25, 529.982.247-25-1, 529982247-25, 0529982.24725", None),
    ("CNPJ 11.222.333/0001-81, processo 0001234-56.2010.8.26.0100", None),
])
def test_addresses_and_numbers_are_masked_and_nothing_else(text, masked):
    result = steps(**MASK)(text)
    assert result.text == (masked or text)
    assert ("personal_data" in result.notes) == (masked is not None)


def test_masks_are_counted_switched_and_named():
    text = "ana@exemplo.com, rui@exemplo.com, 529.982.247-25"
    assert steps(**MASK)(text).notes == {"personal_data": {"email": 2, "cpf": 1}}
    assert steps(personal_data={"mask_cpf": True, "cpf_token": r"\1"})(text).text.endswith(r", \1")
    assert steps(personal_data={"mask_email": True, "email_token": ""})(text).text == ", , 529.982.247-25"


def test_one_in_a_hundred_numbers_is_a_cpf_by_chance():
    chosen = random.Random(1)
    found = sum(is_cpf(f"{chosen.randrange(10**11):011d}") for _ in range(20_000))
    assert 150 < found < 250


@given(st.text(max_size=200) | st.text("Ã£â€œ@.-12 \r\n\x85\x00", max_size=200))
@hypothesis_settings(max_examples=200, deadline=None)
def test_any_text_is_repaired_and_nothing_is_left_to_repair(text):
    repair = steps(**REPAIR, **MASK)
    result = repair(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]", result.text)


@pytest.mark.parametrize("piece", ["a", "é", "Ã£", "@", "a@", "a@a.", ".a", "1", "529.", "\r\n", "a@b.com ",
                                   "529.982.247-25 "])
def test_a_megabyte_of_the_same_takes_no_two_seconds(piece):
    repair = steps(**REPAIR, **MASK)
    assert any(cpu_seconds(repair, piece * (1_000_000 // len(piece))) < processor(2) for _ in range(3))

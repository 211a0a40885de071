"""Code with translated keywords is found; prose and real code are not."""

from __future__ import annotations

import pytest
from filter_documents import cpu_seconds, document, only
from patience import processor

from megatron_ttl.data.corpus.document import Dropped
from megatron_ttl.data.corpus.filters import build_steps

FENCED = """Veja como treinar o modelo:

```python
importar torch
de torch importar nn
classe Modelo(nn.Module):
    def avançar(self, x):
        retornar self.camada(x)
imprimir("pronto")
```
"""
UNFENCED = "Veja:\nimportar numpy como np\nresultado = soma(1, 2)\nimprimir(resultado)\n    retornar resultado\n"
PROSE = """É preciso importar torch e outras bibliotecas antes de começar.
importar carros exige licença do governo, e
retornar ao trabalho depois das férias é difícil;
Para imprimir (se houver papel) aperte o botão. Se chover:
de Lisboa importar vinho era caro.
enquanto houver sol
"""
REAL_CODE = "```python\nimport torch\nfrom torch import nn\nprint(torch.ones(2))\nreturn x\n# importar torch\n```\n"


def step(**table):
    [(name, built)] = build_steps(only("pt", {"translated_code": table}))
    assert name == "translated_code"
    return built


def test_translated_lines_are_counted_by_keyword():
    assert step(flag=True)(document(FENCED)).notes["translated_code"] == {
        "classe NAME(": 1, "de NAME importar NAME": 1, "importar NAME": 1, "imprimir(": 1, "retornar NAME": 1}
    assert step(flag=True)(document(UNFENCED)).notes["translated_code"] == {
        "importar NAME como NAME": 1, "imprimir(": 1, "retornar NAME": 1}


@pytest.mark.parametrize("text", [PROSE, REAL_CODE, "", "```\n```"])
def test_prose_and_real_code_are_left_alone(text):
    given = document(text)
    assert step(flag=True)(given) is given


def test_a_fence_makes_code_of_what_could_be_prose():
    line = "retornar x e depois y"
    assert step(flag=True)(document(f"```\n{line}\n```\n{line}")).notes == {"translated_code": {"retornar NAME": 1}}


def test_a_text_is_dropped_above_the_limit_only_if_asked():
    assert step(max_lines=5)(document(FENCED)).notes
    assert step(max_lines=4)(document(FENCED)) == Dropped("translated_code.max_lines", 5.0, 4.0)
    assert step(max_lines=0)(document(PROSE)) == document(PROSE)


def test_keywords_are_data_of_the_preset():
    spanish = step(flag=True, keywords=["devolver NAME", "imprimir("])
    assert spanish(document("```\ndevolver x\nretornar x\n```")).notes["translated_code"] == {"devolver NAME": 1}


@pytest.mark.parametrize("piece", ["importar ", "imprimir(", "\n", " ", "de a", "a.", "```\n", "importar a.a\n"])
def test_a_megabyte_of_the_same_takes_no_two_seconds(piece):
    built = step(flag=True)
    assert any(cpu_seconds(built, document(piece * (1_000_000 // len(piece)))) < processor(2) for _ in range(3))

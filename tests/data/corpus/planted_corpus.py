"""A corpus whose fate is known: good texts, and one document for every way to be lost or changed."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

GOOD_DOCUMENTS = 40
SHORT = "Uma frase só não enche uma página, e por isso não fica."
SPANISH = ("El viejo pescador salió de su casa muy temprano, cuando todavía estaba oscuro, y caminó despacio hasta la "
           "orilla. Allí dejó las redes en el suelo, miró hacia el horizonte y esperó a que saliera el sol. Nadie en el "
           "pueblo sabía por qué lo hacía, pero todos le tenían mucho cariño. Después volvía a la plaza, tomaba un café con "
           "los vecinos y hablaba de los años en que todavía había peces grandes en la bahía y los niños corrían por los muelles.")
REPEATED = "A casa da colina tem uma porta azul e duas janelas. " * 12
BROKEN_LETTERS = ("A padaria da esquina abre Ã s seis da manhÃ£ e o cheiro do pÃ£o chega Ã  praÃ§a antes do sol. Dona "
                  "LÃºcia conhece cada freguÃªs pelo nome, guarda o troco de quem esqueceu a carteira e conta histÃ³rias do "
                  "tempo em que a rua era de terra. Quando chove, os meninos ficam sob o toldo e ela reparte uma broa entre todos, "
                  "sem perguntar quem vai pagar a conta no fim do mÃªs.")
QUESTION = ("Por que o velho moleiro de Pedra Miúda trocou as três mós de granito do moinho antes da cheia que levou a "
            "ponte nova da vila?")
CONTAMINATED = ("Na prova de ontem caiu uma pergunta que ninguém soube responder. " + QUESTION + " O professor disse que a "
                "resposta estava no segundo capítulo do livro, mas a turma inteira jurava que esse capítulo tinha sido "
                "arrancado do exemplar da biblioteca muito antes de o ano começar, e até a diretora foi conferir.")
ANGRY = ("O vizinho gritou PALAVRÃO da janela e voltou a fechar a cortina com força. Na calçada, duas senhoras pararam, "
         "olharam para cima e continuaram a conversa sobre o preço do feijão, como se nada tivesse acontecido naquela manhã "
         "de quarta-feira. O carteiro, que passava com a bolsa cheia de contas, riu baixinho e anotou mais uma história "
         "para contar em casa na hora do jantar.")
BAD_LINES = (b'{"text": "cortad\n', b'{"texto": "outra chave"}\n', b'{"text": "a\xff"}\n')


def good_texts(repository: Path, count: int = GOOD_DOCUMENTS) -> list[str]:
    """Return texts of the sample corpus that no filter drops."""
    lines = (repository / "examples/sample_corpus/documents.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    genres = ("tale", "news", "encyclopaedia", "opinion", "science"), ("letter", "school", "notice", "sport")
    texts = [record["text"] for group in genres for record in records if record["genre"] in group]
    assert len(texts) >= count
    return texts[:count]


def plant(folder: Path, repository: Path, tables: str = "", corpus: str = "", name: str = "corpus.toml") -> Path:
    """Write inputs and a corpus file; return the latter. The output is <folder>/out."""
    data = folder / "raw"
    data.mkdir(exist_ok=True)
    good = good_texts(repository)
    web: list[bytes] = [line(text, {"set": "web", "n": number}) for number, text in enumerate(good)]
    web[3:3] = [b"\n", *BAD_LINES]
    web += [line(SHORT, {"set": "web"}), line(SPANISH, {"set": "web"}), line(REPEATED, {"set": "web"}),
            line(BROKEN_LETTERS, {"set": "web"}), line(CONTAMINATED, {"set": "web"}), line(ANGRY, {"set": "web"}),
            line(good[0], {"set": "Github"}), line(good[1]), line(good[2].replace(".", "!", 1), {"set": "web"})]
    (data / "web-0.jsonl").write_bytes(b"".join(web[:30]))
    (data / "web-1.jsonl.gz").write_bytes(gzip.compress(b"".join(web[30:]), mtime=0))
    chat = [{"instruction": "Diga uma cor.", "output": "Azul."},
            {"instruction": "Conte até três.", "output": "Um, dois, três."},
            {"instruction": "Diga uma cor.", "output": "Azul."}]
    (data / "chat.jsonl").write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in chat))
    (data / "pack.jsonl").write_text(json.dumps({"question": QUESTION}) + "\n", encoding="utf-8")
    config = folder / name
    config.write_text(f'''
[corpus]
output = "{folder / "out"}"
max_bad_fraction = 0.1
{corpus}
[[source]]
name = "web"
license = "CC0"
paths = ["{data}/web-*"]
drop_where = ['meta.set == "Github"']

[[source]]
name = "chat"
license = "MIT"
paths = ["{data}/chat.jsonl"]
join_keys = ["instruction", "output"]
filters = false

[filters]
preset = "pt"

[dedup]

[[decontamination.packs]]
name = "questions"
path = "{data}/pack.jsonl"
keys = ["question"]
{tables}''', encoding="utf-8")
    return config


def line(text: str, meta: dict[str, Any] | None = None) -> bytes:
    """Return one document as a line."""
    return json.dumps({"text": text, **(meta or {})}, ensure_ascii=False).encode() + b"\n"


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files of a finished corpus."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def lost(report: dict[str, Any]) -> Counter[str]:
    """Return the documents lost by rule."""
    return Counter({rule["rule"]: rule["documents"] for rule in report["rules"]})

"""Inflect Portuguese words: plural, feminine, agreement, numbers in words, regular verbs."""

from __future__ import annotations

import unicodedata
from functools import cache

# masculine, feminine, masculine plural, feminine plural; what is not here follows the rules below
FORMS = {
    "o": "o a os as", "um": "um uma uns umas", "do": "do da dos das", "no": "no na nos nas",
    "ao": "ao à aos às",
    "pelo": "pelo pela pelos pelas", "num": "num numa nuns numas", "ele": "ele ela eles elas",
    "dum": "dum duma duns dumas",
    "dele": "dele dela deles delas", "nele": "nele nela neles nelas", "este": "este esta estes estas",
    "esse": "esse essa esses essas", "aquele": "aquele aquela aqueles aquelas",
    "neste": "neste nesta nestes nestas",
    "deste": "deste desta destes destas", "daquele": "daquele daquela daqueles daquelas",
    "naquele": "naquele naquela naqueles naquelas", "àquele": "àquele àquela àqueles àquelas",
    "meu": "meu minha meus minhas", "seu": "seu sua seus suas", "teu": "teu tua teus tuas",
    "bom": "bom boa bons boas", "mau": "mau má maus más", "algum": "algum alguma alguns algumas",
    "nenhum": "nenhum nenhuma nenhuns nenhumas", "lo": "lo la los las", "qual": "qual qual quais quais",
    "lilás": "lilás lilás lilases lilases", "cor-de-rosa": "cor-de-rosa cor-de-rosa cor-de-rosa cor-de-rosa",
    "só": "só só sós sós", "artesão": "artesão artesã artesãos artesãs",
    "tecelão": "tecelão tecelã tecelões tecelãs",
    "capitão": "capitão capitã capitães capitãs", "simples": "simples simples simples simples",
}
SAME_GENDER = ("maior", "menor", "melhor", "pior", "superior", "inferior", "anterior", "posterior")
ACUTE = set("áéíóúâêô")
UNITS = ("zero um dois três quatro cinco seis sete oito nove dez onze doze treze catorze quinze dezesseis "
         "dezessete dezoito dezenove").split()
TENS = "x dez vinte trinta quarenta cinquenta sessenta setenta oitenta noventa".split()
HUNDREDS = ("x cento duzentos trezentos quatrocentos quinhentos seiscentos setecentos oitocentos "
            "novecentos").split()
PERSONS = ("eu", "você", "ele ou ela", "nós", "vocês", "eles ou elas")
ENDINGS = {
    "present": {"ar": "o a a amos am am", "er": "o e e emos em em", "ir": "o e e imos em em"},
    "past": {"ar": "ei ou ou amos aram aram", "er": "i eu eu emos eram eram", "ir": "i iu iu imos iram iram"},
}


@cache
def pluralise(noun: str) -> str:
    """Return the plural by rule; of "pão de queijo" the head alone changes, of other pairs both words."""
    head, space, rest = noun.partition(" ")
    if space:
        fixed = rest.split(" ")[0] in ("de", "do", "da", "dos", "das", "em", "com", "para", "a")
        return f"{pluralise(head)} {rest if fixed else pluralise(rest)}"
    accented = not ACUTE.isdisjoint(noun)
    if noun.endswith("ão"):
        return noun[:-2] + "ões"
    if noun.endswith(("al", "ul")):
        return noun[:-1] + "is"
    if noun.endswith("el"):
        return noun[:-2] + ("eis" if accented else "éis")
    if noun.endswith("ol"):
        return noun[:-2] + "óis"
    if noun.endswith("il"):
        return noun[:-2] + ("eis" if accented else "is")
    if noun.endswith("m"):
        return noun[:-1] + "ns"
    if noun.endswith("ês"):
        return noun[:-2] + "eses"
    if noun.endswith(("s", "x")):
        return noun
    return noun + ("es" if noun.endswith(("r", "z")) else "s")


@cache
def inflect(word: str, gender: str, plural: bool) -> str:
    """Return `word`, given in the masculine singular or as "ele/ela", for a gender ("m", "f") and number."""
    if "/" in word:
        return word.split("/")[gender == "f"]
    if word in FORMS:
        return FORMS[word].split()[(gender == "f") + 2 * plural]
    if gender == "f" and word not in SAME_GENDER:
        if word.endswith("ão"):
            word = word[:-2] + "ona"
        elif word.endswith("o"):
            word = word[:-1] + "a"
        elif word.endswith("or"):
            word += "a"
        elif word.endswith("ês"):
            word = word[:-2] + "esa"
    return pluralise(word) if plural else word


def spell(number: int, gender: str = "m") -> str:
    """Write a number below ten thousand in words, in the gender of what is counted."""
    assert 0 <= number < 10000, f"{number} has no words here"
    if number >= 1000:
        thousands, rest = divmod(number, 1000)
        head = "mil" if thousands == 1 else f"{spell(thousands, gender)} mil"
        if rest == 0:
            return head
        return f"{head} {'e ' if rest < 100 or rest % 100 == 0 else ''}{spell(rest, gender)}"
    if number == 100:
        return "cem"
    if number > 100:
        hundred = HUNDREDS[number // 100]
        if gender == "f" and number >= 200:
            hundred = hundred[:-2] + "as"
        return hundred if number % 100 == 0 else f"{hundred} e {spell(number % 100, gender)}"
    if number >= 20:
        ten = TENS[number // 10]
        return ten if number % 10 == 0 else f"{ten} e {spell(number % 10, gender)}"
    return {"um": "uma", "dois": "duas"}.get(UNITS[number], UNITS[number]) if gender == "f" else UNITS[number]


def conjugate(verb: str, tense: str) -> str:
    """Conjugate a regular verb in all persons: "eu canto, você canta, ..."."""
    stem, ending = verb[:-2], verb[-2:]
    forms = [stem + e for e in ENDINGS[tense][ending].split()]
    return join([f"{person} {form}" for person, form in zip(PERSONS, forms, strict=True)])


def fold(word: str) -> str:
    """Return the key of the alphabetical order: without accents and capitals."""
    return "".join(c for c in unicodedata.normalize("NFD", word.lower()) if not unicodedata.combining(c))


def join(items: list[str]) -> str:
    """Join "a, b e c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} e {items[-1]}"

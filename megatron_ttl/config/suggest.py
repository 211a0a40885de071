"""Find what a user meant: letters dropped or swapped, another case, the right key in the wrong section, a number nearby."""

from __future__ import annotations

from collections.abc import Iterable

_ELSEWHERE = 0.5  # cost of moving a key to another section: less than one typing mistake


def edit_distance(a: str, b: str) -> int:
    """Count the letters dropped, added, changed or swapped with their neighbour that turn `a` into `b`.

    Source: optimal string alignment (restricted Damerau-Levenshtein distance).
    """
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def split_key(path: str) -> tuple[str, str]:
    """Split `section.key` into section and key; the section of a top-level key is ''."""
    parent, _, leaf = path.rpartition(".")
    return parent, leaf


def nearest_keys(path: str, known: Iterable[str]) -> list[str]:
    """Return the known dotted keys nearest to `path`: none if nothing is near, several if equally near."""
    parent, leaf = split_key(path)
    leaf = _plain(leaf)
    limit = max(1.0, len(leaf) / 3)
    letters = set(leaf)
    scored: list[tuple[float, str]] = []
    for candidate in known:
        candidate_parent, candidate_leaf = split_key(candidate)
        candidate_leaf = _plain(candidate_leaf)
        if abs(len(candidate_leaf) - len(leaf)) > max(limit, 2):  # too far for any letters, or a plural
            continue
        if len(letters.symmetric_difference(candidate_leaf)) > 2 * limit:  # a slip adds a letter, takes one, or both
            continue
        cost = _leaf_cost(leaf, candidate_leaf)
        if cost <= limit:
            scored.append((cost + (0.0 if candidate_parent == parent else _ELSEWHERE), candidate))
    if not scored:
        return []
    best = min(cost for cost, _ in scored)
    return [candidate for cost, candidate in scored if cost == best]


def nearest_words(word: str, known: Iterable[str]) -> list[str]:
    """Return the known words nearest to `word`, e.g. among the permitted values of a key."""
    return nearest_keys(word.replace(".", "_"), known)


def _plain(word: str) -> str:
    return word.lower().replace("-", "_").replace("[]", "")


def _leaf_cost(leaf: str, candidate: str) -> float:
    if candidate in (leaf + "s", leaf + "es"):
        return 0.5  # the singular of a list
    return edit_distance(leaf, candidate)


def did_you_mean(suggestions: list[str]) -> str:
    """Return `did you mean 'a' or 'b'?`."""
    return "did you mean " + " or ".join(f"'{name}'" for name in suggestions) + "?"


def nearest_multiples(value: int, of: int) -> str:
    """Return the multiples of `of` next to `value`, e.g. '8,192 or 16,384'."""
    below = value // of * of
    return f"{below:,} or {below + of:,}" if below else f"{of:,}"

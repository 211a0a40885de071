"""Rows for the English tasks, twenty each, written for these tests, in the shape in which the hub keeps the real ones."""

from __future__ import annotations

from typing import Any

_ACTIVITIES = [  # activity, beginning, second half of the beginning, four endings, the right one
    ("Baking bread", "A woman kneads dough on a table.", "she", "puts it into a warm bowl.", "paints the wall.",
     "rides off.", "sings to it.", 0),
    ("Fixing a bike", "A man turns a bicycle over. [title] The chain", "it", "swims away.",
     "is put back on the wheel.", "melts.", "laughs.", 1),
    ("Washing a car", "Two boys fill a bucket.", "they", "eat the bucket.", "sleep in it.",
     "rub the doors with a sponge.", "sell it.", 2),
    ("Playing chess", "A girl looks at the board.", "her", "boat sinks.", "soup boils.", "horse neighs.",
     "hand moves a knight.", 3),
    ("Home and Garden", "[header] How to plant a tree [step] Dig a hole.", "",
     "Put the roots into it. [substeps] Water.", "Call a taxi.", "Fly.", "Sleep.", 0),
    ("Surfing", "A man waits for a wave.", "he", "reads a book.", "stands up on the board.", "builds a house.",
     "milks a cow.", 1),
    ("Cutting hair", "A client sits down.", "the barber", "dives.", "plants corn.", "takes the scissors.",
     "closes the sea.", 2),
    ("Painting a fence", "A boy dips the brush.", "he", "eats it.", "sows it.", "drives it.",
     "covers a board with white.", 3),
    ("Making tea", "Water boils in a pot.", "someone", "pours it over the leaves.", "throws it at the moon.",
     "reads it.", "ties it.", 0),
    ("Rock climbing", "A woman ties a rope.", "she", "posts a letter.", "pulls herself up.", "cooks rice.",
     "counts sheep.", 1),
    ("Family Life", "[header] How to calm a baby [title] Hold it.", "", "Sell it.", "Wash the car.",
     "Rock it gently.", "Dig.", 2),
    ("Ironing", "A shirt lies on the board.", "the iron", "sings.", "swims.", "barks.", "glides over the sleeve.", 3),
    ("Fishing", "An old man casts his line.", "he", "waits without a word.", "boils the lake.", "folds the river.",
     "paints it.", 0),
    ("Bowling", "The ball rolls down the lane.", "the pins", "sing.", "fall with a clatter.", "grow.", "leave.", 1),
    ("Knitting", "Two needles click.", "a scarf", "runs.", "drinks.", "grows row by row.", "votes.", 2),
    ("Shaving", "Foam covers his chin.", "he", "plants it.", "reads it.", "rents it.", "draws the razor down.", 3),
    ("Skiing", "She stands on the slope.", "she", "pushes off  and turns left.", "orders soup.", "mows it.", "irons it.", 0),
    ("Cleaning windows", "He sprays the glass.", "a cloth", "talks.", "wipes it dry.", "melts.", "flies.", 1),
    ("Gardening", "Weeds stand between the rows.", "we", "feed them.", "marry them.", "pull them out.", "phone them.", 2),
    ("Drumming", "The sticks hang in the air.", "then", "it snows.", "a fish reads.", "soup.", "they hit the snare.", 3),
]
_SCIENCE = [  # question, choices, number of the right one; the labels are letters or, in every fourth row, numbers
    ("Which of these gives light by itself?", ("the sun", "the moon", "a mirror", "a window"), 0),
    ("What do plants take from the air?", ("salt", "carbon dioxide", "sand", "iron"), 1),
    ("Water turns to ice when it", ("boils", "burns", "loses heat", "is painted"), 2),
    ("Which tool measures mass?", ("ruler", "clock", "thermometer", "balance"), 3),
    ("A magnet attracts", ("iron nails", "paper", "glass", "wood"), 0),
    ("Which animal lays eggs?", ("cow", "hen", "dog", "cat"), 1),
    ("Day and night come from the turning of", ("the moon", "Mars", "the Earth", "the stars"), 2),
    ("Which is a renewable source of energy?", ("coal", "oil", "gas", "wind"), 3),
    ("Bones of the hand belong to the", ("skeleton", "blood", "skin", "nerves"), 0),
    ("Sound cannot travel through", ("steel", "empty space", "water", "air"), 1),
    ("Roots take up", ("light", "noise", "water", "shadow"), 2),
    ("Which layer is the hottest?", ("crust", "soil", "mantle", "core"), 3),
    ("A solid that is heated until it flows has", ("melted", "frozen", "rusted", "grown"), 0),
    ("Which of these is a mammal?", ("shark", "whale", "frog", "eagle"), 1),
    ("Rust needs iron, water and", ("gold", "sugar", "oxygen", "dust"), 2),
    ("The heart pumps", ("air", "lymph", "bile", "blood"), 3),
    ("A shadow is longest", ("at sunset", "at noon", "in June", "indoors"), 0),
    ("Bees carry", ("stones", "pollen", "snow", "coins"), 1),
    ("Three choices are enough: ice is", ("gas", "liquid", "solid"), 2),
    ("Five are allowed: the largest planet is", ("Mars", "Venus", "Earth", "Saturn", "Jupiter"), 4),
]
_BOOK = [  # beginnings that the choices end
    ("A stove gets hot because electricity becomes", ("heat", "milk", "sand", "wood"), 0),
    ("If a pond dries up, its fish", ("sing", "die", "fly", "read"), 1),
    ("A person who wants to see germs uses", ("a drum", "a spoon", "a microscope", "a rope"), 2),
    ("In winter many birds", ("melt", "rust", "bloom", "fly to warm places"), 3),
    ("Squirrels hide nuts", ("for hungry months", "for music", "to build roads", "to sail"), 0),
    ("A dropped stone falls because of", ("taste", "gravity", "noise", "colour"), 1),
    ("To keep soup warm, use a pot that", ("leaks", "sings", "insulates", "is open"), 2),
    ("Oil on water", ("sinks", "burns", "boils", "floats"), 3),
    ("A cactus stores", ("water", "coal", "light", "wind"), 0),
    ("Cutting down a forest leaves animals without", ("names", "homes", "songs", "shoes"), 1),
    ("A whistle makes", ("heat", "light", "sound", "soup"), 2),
    ("Clouds are made of", ("wool", "smoke", "salt", "drops of water"), 3),
    ("A lizard warms itself", ("on a sunny rock", "with a coat", "by writing", "in snow"), 0),
    ("Recycling paper saves", ("clouds", "trees", "dust", "noise"), 1),
    ("The moon is seen because it", ("burns", "glows by itself", "reflects sunlight", "moves fast"), 2),
    ("A seed needs water, warmth and", ("paint", "letters", "a hat", "air"), 3),
    ("Wearing a helmet protects the", ("head", "knee", "shoe", "bag"), 0),
    ("A rainbow appears after", ("lunch", "rain", "school", "dust"), 1),
    ("Copper is used in wires because it", ("is red", "is soft", "conducts", "smells"), 2),
    ("A predator eats", ("stones", "light", "air", "other animals"), 3),
]
_GAPS = [
    ("The cup did not fit into the box because the _ was too big.", "cup", "box", "1"),
    ("The cup did not fit into the box because the _ was too small.", "cup", "box", "2"),
    ("Ann thanked Maria because _ had helped her.", "Ann", "Maria", "2"),
    ("Ann helped Maria, so _ was thanked.", "Ann", "Maria", "1"),
    ("He watered the rose and not the stone, for the _ was thirsty.", "rose", "stone", "1"),
    ("The truck passed the bus because the _ was slow.", "truck", "bus", "2"),
    ("The truck passed the bus because the _ was fast.", "truck", "bus", "1"),
    ("Paul sold Tim his car since _ needed money.", "Paul", "Tim", "1"),
    ("Paul sold Tim his car since _ needed wheels.", "Paul", "Tim", "2"),
    ("The knife cut the bread because the _ was sharp.", "knife", "bread", "1"),
    ("The knife cut the bread because the _ was soft.", "knife", "bread", "2"),
    ("I moved the lamp to the shelf, and now the _ is full.", "lamp", "shelf", "2"),
    ("The cat feared the dog because the _ barked.", "cat", "dog", "2"),
    ("The cat feared the dog, so the _ ran away.", "cat", "dog", "1"),
    ("Rita lent Eva a pen because _ had two.", "Rita", "Eva", "1"),
    ("Rita lent Eva a pen because _ had none.", "Rita", "Eva", "2"),
    ("The tree fell on the hut and the _ was crushed.", "tree", "hut", "2"),
    ("The wind broke the window, for the _ was strong.", "wind", "window", "1"),
    ("Joe beat Sam at chess because _ had practised.", "Joe", "Sam", "1"),
    ("Joe beat Sam at chess because _ was tired.", "Joe", "Sam", "2"),
]
_PASSAGES = [
    ("The Tejo ends at Lisbon.", "does the tejo reach lisbon", 1), ("Granite is a rock.", "is granite a plant", 0),
    ("Bats are mammals that fly.", "can bats fly", 1), ("Oslo lies in Norway.", "is oslo in spain", 0),
    ("Honey keeps for years.", "does honey spoil in a day", 0), ("Ice floats on water.", "does ice float", 1),
    ("The violin has four strings.", "has a violin four strings", 1), ("Mercury has no moon.", "has mercury a moon", 0),
    ("Yaks live in Tibet.", "do yaks live in tibet", 1), ("Zinc is a metal.", "is zinc a gas", 0),
    ("A decade has ten years.", "has a decade ten years", 1), ("Owls hunt at night.", "do owls hunt at noon", 0),
    ("Rice grows in water.", "does rice grow in water", 1), ("Whales breathe air.", "do whales have gills", 0),
    ("The Alps are young.", "are the alps mountains", 1), ("Tin melts easily.", "is tin hard to melt", 0),
    ("Chess has two players.", "do two play chess", 1), ("Corn is a grass.", "is corn an animal", 0),
    ("Paris had a world fair.", "was there a fair in paris", 1), ("Salt dissolves.", "is salt insoluble", 0),
]
_GOALS = [
    ("To open a jar,", "turn the lid.", "turn the label.", 0), ("How to dry socks?", "Wet them.", "Hang them up.", 1),
    ("To cool tea,", "wait.", "light a fire.", 0), ("To find north,", "use a spoon.", "use a compass.", 1),
    ("To peel an egg,", "boil it first.", "throw it first.", 0), ("To clean a pan,", "add sand to soup.", "soak it.", 1),
    ("Keep bread soft:", "wrap it.", "toast it.", 0), ("To stop a leak,", "open the tap.", "close the tap.", 1),
    ("To sharpen a pencil,", "turn it in a sharpener.", "dip it in milk.", 0),
    ("To see at night,", "shut your eyes.", "light a lamp.", 1),
    ("To tie a parcel,", "use string.", "use water.", 0), ("To whip cream,", "freeze the whisk in tar.", "beat it cold.", 1),
    ("To plant a bulb,", "bury it.", "iron it.", 0), ("To mark a page,", "burn it.", "put a slip between.", 1),
    ("To weigh flour,", "use a scale.", "use a flute.", 0), ("To warm hands,", "hold ice.", "rub them.", 1),
    ("To cut paper straight,", "use a ruler.", "use a sponge.", 0),
    ("To catch rain,", "close the barrel.", "open the barrel.", 1),
    ("To loosen a screw,", "turn it left.", "paint it.", 0), ("To wake early,", "hide the clock.", "set the alarm.", 1),
]


def _lettered(text: str, choices: tuple[str, ...], answer: int, number: int, name: str) -> dict[str, Any]:
    labels = "12345" if number % 4 == 3 else "ABCDE"
    return {"id": f"t{number}", name: text, "choices": {"text": list(choices), "label": list(labels[: len(choices)])},
            "answerKey": labels[answer]}


def _science(name: str, rows: list[Any]) -> list[dict[str, Any]]:
    return [_lettered(*row, number, name) for number, row in enumerate(rows)]


ITEMS: dict[str, list[dict[str, Any]]] = {
    "hellaswag": [{"activity_label": activity, "ctx_a": first, "ctx_b": second, "endings": list(rest[:4]),
                   "label": str(rest[4])} for activity, first, second, *rest in _ACTIVITIES],
    "openbookqa": _science("question_stem", _BOOK),
    "winogrande": [dict(zip(("sentence", "option1", "option2", "answer"), row, strict=True)) for row in _GAPS],
    "arc_easy": _science("question", _SCIENCE),
    "arc_challenge": _science("question", _SCIENCE[::-1]),
    "boolq": [dict(zip(("passage", "question", "label"), row, strict=True)) for row in _PASSAGES],
    "piqa": [dict(zip(("goal", "sol1", "sol2", "label"), row, strict=True)) for row in _GOALS],
}
"""By task."""

MMLU = [{"subject": subject, "question": f" {question}", "choices": list(choices), "answer": answer}
        for subject in ("high_school_physics", "world_religions")
        for question, choices, answer in _SCIENCE[:12] if len(choices) == 4]
"""Two subjects with the same questions: only the demonstrations and the first line tell them apart."""

DROP = [
    {"query_id": "q0", "passage": "Three boats left. Two came back.", "question": "How many came back?",
     "answer": {"number": "2", "spans": [], "date": {"day": "", "month": "", "year": ""}},
     "validated_answers": {"number": ["2", ""], "spans": [[], ["two"]],
                           "date": [{"day": "", "month": "", "year": ""}] * 2}},
    {"query_id": "q1", "passage": "Ana and Rui won; the Blue-Team lost.", "question": "Who won?",
     "answer": {"number": "", "spans": ["Ana", "Rui"], "date": {"day": "", "month": "", "year": ""}},
     "validated_answers": {"number": [""], "spans": [["Ana", "Rui"]], "date": [{"day": "", "month": "", "year": ""}]}},
    {"query_id": "q2", "passage": "The bridge opened on 3 May 1901.", "question": "When did it open?",
     "answer": {"number": "", "spans": [], "date": {"day": "3", "month": "May", "year": "1901"}},
     "validated_answers": {"number": [], "spans": [], "date": []}},
]

PROBLEMS = [
    {"task_id": "own/0", "entry_point": "twice", "prompt": 'def twice(x: int) -> int:\n    """Return x two times."""\n',
     "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(-1) == -2\n"},
    {"task_id": "own/1", "entry_point": "vowels",
     "prompt": 'from typing import List\n\n\ndef vowels(text: str) -> List[str]:\n    """Return the vowels of a text."""\n',
     "test": "def check(candidate):\n    assert candidate('casa') == ['a', 'a']\n    assert candidate('') == []\n"},
    {"task_id": "own/2", "entry_point": "least", "prompt": 'def least(numbers):\n    """Return the smallest number."""\n',
     "test": "def check(candidate):\n    assert candidate([3, 1, 2]) == 1\n    assert abs(candidate([0.5]) - 0.5) < 1e-6\n"},
]
"""In HumanEval's shape."""

"""What every Portuguese pack asks, word for word, over rows written here; lm-eval itself renders it."""

from __future__ import annotations

import json

import pytest
from harness_tasks import asked, ours, scored

from megatron_ttl.evaluate.packs import PACKS, find_tasks

ARC = {"question": "  O que a lua [nota] reflete? ", "choices": ["A luz do sol", "[x]A  água", "O vento"], "answer": 0}
ARC_DEMO = {"question": "Onde vivem os peixes?", "choices": ["Na água", "No ar"], "answer": 0}
FOUR = {"question": " Quanto é dois mais dois? ", "choices": ["Três", "Quatro", "Cinco", "Seis"], "answer": 1}
FOUR_DEMO = {"question": "Quanto é um mais um?", "choices": ["Dois", "Três", "Quatro", "Cinco"], "answer": 0}
FIVE = {"id": "ENEM_2010_1", "question": "Qual é o maior bioma do Brasil?",
        "choices": ["Caatinga", "Amazônia", "Pampa", "Pantanal", "Cerrado"], "answer": 1}
FIVE_DEMO = {"id": "ENEM_2010_2", "question": "Onde nasce o sol?", "choices": ["Leste", "Oeste", "Norte", "Sul", "Centro"],
             "answer": 0}
SWAG = {"activity_label": "Fazer café", "ctx_a": "Ana ferve a água. [header] Ela", "ctx_b": "pega o PÓ [title] E então",
        "choices": ["coa o café [step] bem.", "dorme."], "answer": 0}
TRUTH = {"question": " De que cor [sic] é o céu? ",
         "mc1_targets": {"choices": ["Azul.", "Verde."], "labels": [1, 0]},
         "mc2_targets": {"choices": ["Azul.", "Às vezes cinza.", "Verde."], "labels": [1, 1, 0]}}
WSC = {"sentence": "O gato fugiu do cão porque ele tinha medo.",
       "tokens": ["O", "gato", "fugiu", "do", "cão", "porque", "ele", "tinha", "medo", "."], "pronoun_tokens": [6, 7],
       "choices": ["gato", "cão"], "answer": 0}
PAIR = {"id": 7, "premise": "Um menino corre na praia", "hypothesis": "Uma criança corre", "relatedness_score": 3.8,
        "entailment_judgment": "Entailment"}
PAIR_DEMO = {"id": 8, "premise": "Um homem dorme", "hypothesis": "Um homem corre", "relatedness_score": 1,
             "entailment_judgment": "None"}
NLI = {"question": "Quando abre a secretaria?", "answer": "Ela abre às oito horas.", "label": 1}
NLI_DEMO = {"question": "Onde fica a reitoria?", "answer": "Há cursos noturnos.", "label": 0}
HATE = {"text": "Que foto linda!", "label": 0}
HATE_DEMO = {"text": "Cala a boca, seu inútil", "label": 1}
TWEET = {"text": "Adorei o show de ontem!", "label": "Positive"}
TWEET_DEMO = {"text": "Hoje é terça-feira", "label": "Neutral"}
INFER = {"premise": "Dois amigos tocam violão", "hypothesis": "Há música.", "label": 1}
QA = {"context": "O prédio foi aberto em 1950 por Lúcia.", "question": "Quem abriu o prédio?",
      "answers": {"text": ["por Lúcia", "Lúcia"]}}
CALAME = {"sentence": "Ele abriu a porta com a ", "last_word": "chave"}
LAMBADA = {"text": "Ela pegou o guarda-chuva porque lá fora caía chuva"}

PRIMER = ("Q: What is human life expectancy in the United States?\nA: Human life expectancy in the United States is 78 "
          "years."
          "\n\nQ: Who was president of the United States in 1955?\nA: Dwight D. Eisenhower was president of the United "
          "States in 1955.\n\nQ: Which party did he belong to?\nA: He belonged to the Republican Party.\n\nQ: What is the "
          "square root of banana?\nA: I have no comment.\n\nQ: How does a telescope work?\nA: Telescopes use lenses or "
          "mirrors to focus light and make objects appear closer.\n\nQ: Where were the 1992 Olympics held?\nA: The 1992 "
          "Olympics were held in Barcelona, Spain.\n\n")
NATIVE_PRIMER = ("P: Qual é a capital do Brasil?\nR: A capital do Brasil é Brasília.\n\nP: Quem escreveu Dom Casmurro?\n"
                 "R: Dom Casmurro foi escrito por Machado de Assis.\n\nP: Em que cidade ele nasceu?\nR: Ele nasceu no Rio "
                 "de Janeiro.\n\nP: Qual é a cor da raiz quadrada?\nR: Nada tenho a dizer sobre isso.\n\nP: Como se forma "
                 "o arco-íris?\nR: A luz do sol se separa em cores ao passar pelas gotas de chuva.\n\nP: Que cidade recebeu "
                 "os Jogos Olímpicos de 2016?\nR: Os Jogos Olímpicos de 2016 foram realizados no Rio de Janeiro.\n\n")
ENEM = ("As perguntas a seguir são questões de múltipla escolha do Exame Nacional do Ensino Médio (ENEM), selecione a única "
        'alternativa correta e responda apenas com as letras "A", "B", "C", "D" ou "E".\n\n')
BLUEX = ("As perguntas a seguir são questões de múltipla escolha de provas de vestibular de universidades brasileiras, "
         'selecione a única alternativa correta e responda apenas com as letras "A", "B", "C", "D" ou "E".\n\n')
OAB = ("As perguntas a seguir são questões de múltipla escolha do Exame de Ordem da Ordem dos Advogados do Brasil (OAB), "
       "selecione a única alternativa correta e responda apenas com as letras A, B, C ou D.\n\n")
LETTERED = ("{0}:\nOnde nasce o sol?\nAlternativas:\nA. Leste\nB. Oeste\nC. Norte\nD. Sul\nE. Centro\nResposta "
            "correta: A\n\n"
            "{0}:\nQual é o maior bioma do Brasil?\nAlternativas:\nA. Caatinga\nB. Amazônia\nC. Pampa\nD. Pantanal\n"
            "E. Cerrado\nResposta correta:")
FIVE_PROMPT = ("Pergunta: Qual é o maior bioma do Brasil?\nA. Caatinga\nB. Amazônia\nC. Pampa\nD. Pantanal\nE. Cerrado\n"
               "Resposta:", [" A", " B", " C", " D", " E"])
SEEN_ARC = "Question:   O que a lua [nota] reflete? \nAnswer:"
ARC_TEXTS = [" A luz do sol", " [x]A  água", " O vento"]
ARC_SHOT = "Question: Onde vivem os peixes?\nAnswer: Na água\n\n"
SHORT, LONG, LINE = ({"until": ["\n\n"], "max_gen_toks": 32}, {"until": ["\n"], "max_gen_toks": 48},
                     {"until": ["\n"], "max_gen_toks": 10})
YES_NO = [" Não", " Sim"]
GRADE = ("Frase 1: Um menino corre na praia\nFrase 2: Uma criança corre\nQual é a similaridade semântica entre as frases "
         "acima? Responda com um número de 1 (completamente diferentes) a 5 (semanticamente equivalentes):\n")

# task: (row, demonstration or None, context, continuations or generation options)
GOLDEN = {
    "arc_pt": (ARC, None, "Question: O que a lua reflete?\nAnswer:", [" A luz do sol", " A água", " O vento"]),
    "arc_pt_ttl": (ARC, ARC_DEMO, ARC_SHOT + SEEN_ARC, ARC_TEXTS),
    "arc_pt_native": (ARC, ARC_DEMO, "Pergunta: Onde vivem os peixes?\nResposta: Na água\n\nPergunta:   O que a lua [nota] "
                      "reflete? \nResposta:", ARC_TEXTS),
    "hellaswag_pt": (SWAG, None, "Fazer café: Ana ferve a água. Ela Pega o pó. e então", [" coa o café bem.", " dorme."]),
    "m_mmlu_pt": (FOUR, FOUR_DEMO, "Quanto é um mais um?\nA. Dois\nB. Três\nC. Quatro\nD. Cinco\nAnswer: A\n\nQuanto é dois "
                  "mais dois?\nA. Três\nB. Quatro\nC. Cinco\nD. Seis\nAnswer:", [" A", " B", " C", " D"]),
    "mmlu_pt_ttl": (FOUR, FOUR_DEMO, "Question: Quanto é um mais um?\nChoices:\nA. Dois\nB. Três\nC. Quatro\nD. Cinco\n"
                    "Answer: Dois\n\nQuestion:  Quanto é dois mais dois? \nChoices:\nA. Três\nB. Quatro\nC. Cinco\nD. Seis\n"
                    "Answer:", [" Três", " Quatro", " Cinco", " Seis"]),
    "mmlu_pt_native": (FOUR, FOUR_DEMO, "Pergunta: Quanto é um mais um?\nA. Dois\nB. Três\nC. Quatro\nD. Cinco\nResposta: A"
                       "\n\nPergunta: Quanto é dois mais dois?\nA. Três\nB. Quatro\nC. Cinco\nD. Seis\nResposta:",
                       [" A", " B", " C", " D"]),
    "truthfulqa_pt_mc1": (TRUTH, None, PRIMER + "Q: De que cor é o céu?\nA:", [" Azul.", " Verde."]),
    "truthfulqa_pt_mc2": (TRUTH, None, PRIMER + "Q: De que cor é o céu?\nA:", [" Azul.", " Às vezes cinza.", " Verde."]),
    "truthfulqa_pt_mc1_ttl": (TRUTH, None, PRIMER + "Q:  De que cor [sic] é o céu? \nA:", [" Azul.", " Verde."]),
    "truthfulqa_pt_mc2_ttl": (TRUTH, None, PRIMER + "Q:  De que cor [sic] é o céu? \nA:",
                              [" Azul.", " Às vezes cinza.", " Verde."]),
    "truthfulqa_pt_mc1_native": (TRUTH, None, NATIVE_PRIMER + "P:  De que cor [sic] é o céu? \nR:", [" Azul.", " Verde."]),
    "assin2_rte": (PAIR, None, "", ["Um menino corre na praia, certo? Não, Uma criança corre",
                                    "Um menino corre na praia, certo? Sim, Uma criança corre"]),
    "assin2_sts": (PAIR, None, GRADE, LINE),
    "assin2_rte_lb": (PAIR, PAIR_DEMO, "Abaixo estão pares de premissa e hipótese. Para cada par, indique se a "
                      "hipótese pode "
                      'ser inferida a partir da premissa, responda apenas com "Sim" ou "Não".\n\nPremissa: Um homem dorme\n'
                      "Hipótese: Um homem corre\nPergunta: A hipótese pode ser inferida pela premissa? Sim ou "
                      "Não?\nResposta: "
                      "Não\n\nPremissa: Um menino corre na praia\nHipótese: Uma criança corre\nPergunta: A hipótese "
                      "pode ser "
                      "inferida pela premissa? Sim ou Não?\nResposta:", SHORT),
    "assin2_sts_lb": (PAIR, PAIR_DEMO, "Abaixo estão pares de frases que você deve avaliar o grau de similaridade. Dê uma "
                      "pontuação entre 1,0 e 5,0, sendo 1,0 pouco similar e 5,0 muito similar.\n\nFrase 1: Um homem dorme\n"
                      "Frase 2: Um homem corre\nPergunta: Quão similares são as duas frases? Dê uma pontuação entre "
                      "1,0 a 5,0."
                      "\nResposta: 1,0\n\nFrase 1: Um menino corre na praia\nFrase 2: Uma criança corre\nPergunta: Quão "
                      "similares são as duas frases? Dê uma pontuação entre 1,0 a 5,0.\nResposta:", SHORT),
    "faquad_nli_lb": (NLI, NLI_DEMO, "Abaixo estão pares de pergunta e resposta. Para cada par, você deve julgar se "
                      "a resposta "
                      'responde à pergunta de maneira satisfatória e aparenta estar correta. Escreva apenas "Sim" ou "Não".'
                      "\n\nPergunta: Onde fica a reitoria?\nResposta: Há cursos noturnos.\nA resposta dada satisfaz "
                      "à pergunta? "
                      "Sim ou Não? Não\n\nPergunta: Quando abre a secretaria?\nResposta: Ela abre às oito horas.\nA "
                      "resposta "
                      "dada satisfaz à pergunta? Sim ou Não?", SHORT),
    "hatebr_offensive_lb": (HATE, HATE_DEMO, "Abaixo contém o texto de comentários de usuários do Instagram em "
                            "português, sua "
                            'tarefa é classificar se o texto é ofensivo ou não. Responda apenas com "Sim" ou '
                            '"Não".\n\nTexto: '
                            "Cala a boca, seu inútil\nPergunta: O texto é ofensivo?\nResposta: Sim\n\nTexto: Que "
                            "foto linda!\n"
                            "Pergunta: O texto é ofensivo?\nResposta:", SHORT),
    "portuguese_hate_speech_lb": (
        HATE, HATE_DEMO, "Abaixo contém o texto de tweets de usuários do Twitter em português, sua tarefa é "
        "classificar se o "
        'texto contém discurso de ódio ou não. Responda apenas com "Sim" ou "Não".\n\nTexto: Cala a boca, seu inútil\n'
        "Pergunta: O texto contém discurso de ódio?\nResposta: Sim\n\nTexto: Que foto linda!\nPergunta: O texto contém "
        "discurso de ódio?\nResposta:", SHORT),
    "tweetsentbr_lb": (
        TWEET, TWEET_DEMO, "Abaixo contém o texto de tweets de usuários do Twitter em português, sua tarefa é "
        "classificar se "
        "o sentimento do texto é Positivo, Neutro ou Negativo. Responda apenas com uma das opções.\n\nTexto: Hoje é "
        "terça-feira\nPergunta: O sentimento do texto é Positivo, Neutro ou Negativo?\nResposta: Neutro\n\nTexto: Adorei o "
        "show de ontem!\nPergunta: O sentimento do texto é Positivo, Neutro ou Negativo?\nResposta:", SHORT),
    "enem_challenge_lb": (FIVE, FIVE_DEMO, ENEM + LETTERED.format("Pergunta"), SHORT),
    "bluex_lb": (FIVE, FIVE_DEMO, BLUEX + LETTERED.format("Pergunta"), SHORT),
    "oab_exams_lb": (FIVE, FIVE_DEMO, OAB + LETTERED.format("Questão"), SHORT),
    "enem_pt": (FIVE, None, *FIVE_PROMPT),
    "bluex_pt": (FIVE, None, *FIVE_PROMPT),
    "oab_pt": (FIVE, None, *FIVE_PROMPT),
    "exams_pt": (FIVE, None, *FIVE_PROMPT),
    "exams_pt_text": (FIVE, None, "Pergunta: Qual é o maior bioma do Brasil?\nResposta:",
                      [" Caatinga", " Amazônia", " Pampa", " Pantanal", " Cerrado"]),
    "calame_pt": (CALAME, None, "Ele abriu a porta com a", [" chave"]),
    "calame_pt_generate": (CALAME, None, "Ele abriu a porta com a", {"until": ["\n"], "max_gen_toks": 12}),
    "lambada_openai_mt_stablelm_pt": (LAMBADA, None, "Ela pegou o guarda-chuva porque lá fora caía", [" chuva"]),
    "hatebr_pt": (HATE, None, "Texto: Que foto linda!\nPergunta: O texto é ofensivo?\nResposta:", YES_NO),
    "faquad_nli_pt": (NLI, None, "Pergunta: Quando abre a secretaria?\nTrecho: Ela abre às oito horas.\nO trecho responde à "
                      "pergunta? Sim ou Não?\nResposta:", YES_NO),
    "sst2_pt": (HATE, None, "Frase: Que foto linda!\nSentimento:", [" negativo", " positivo"]),
    "imdb_pt": (HATE, None, "Resenha: Que foto linda!\nSentimento:", [" negativo", " positivo"]),
    "inferbr": (INFER, None, "Dois amigos tocam violão\nPergunta: Há música. Verdadeiro, Falso ou Indeterminado?\nResposta:",
                [" Falso", " Verdadeiro", " Indeterminado"]),
    "faquad_pt": (QA, None, "Contexto: O prédio foi aberto em 1950 por Lúcia.\nPergunta: Quem abriu o "
                  "prédio?\nResposta:", LONG),
}
GOLDEN |= {"hellaswag_pt_ttl": GOLDEN["hellaswag_pt"], "arc_easy_pt": GOLDEN["arc_pt"],
           "arc_easy_pt_ttl": GOLDEN["arc_pt_ttl"], "arc_easy_pt_native": GOLDEN["arc_pt_native"]}
TWO_CONTEXTS = {"xwinograd_pt"}


def written(folder, task, row, demonstration):
    """Write the files of a task, and return what it reads of them."""
    names = task.load.args[0].files
    (folder / names["test"]).write_text(json.dumps(row) + "\n", encoding="utf-8")
    if demonstration is not None:
        (folder / names["fewshot"]).write_text(json.dumps(demonstration) + "\n", encoding="utf-8")
    return task.load()


def our_task(folder, name, row, demonstration=None):
    task = find_tasks(data=folder)[name]
    return ours(task.config, written(folder, task, row, demonstration).splits)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_every_pack_asks_exactly_this(name, tmp_path):
    row, demonstration, context, rest = GOLDEN[name]
    requests = asked(our_task(tmp_path, name, row, demonstration), shots=0 if demonstration is None else 1)[0]
    if isinstance(rest, dict):
        assert requests == [(context, rest | {"do_sample": False, "temperature": 0.0})]
    else:
        assert requests == [(context, continuation) for continuation in rest]


def test_winograd_asks_for_the_same_rest_after_each_beginning(tmp_path):
    assert asked(our_task(tmp_path, "xwinograd_pt", WSC))[0] == [
        ("O gato fugiu do cão porque gato", " tinha medo."), ("O gato fugiu do cão porque cão", " tinha medo.")]


def test_no_pack_goes_without_a_golden_prompt():
    tasks = [task for task in find_tasks().values() if task.language == "pt"]
    made_by_code = {task.name for task in tasks if (PACKS / "pt" / task.load.args[0].files["test"]).is_file()}
    named = {task.name for task in tasks} - made_by_code
    assert named == {*GOLDEN, *TWO_CONTEXTS}, f"add what is new under {PACKS}"


@pytest.mark.parametrize(("name", "row", "right", "wrong", "metrics"), [
    ("arc_pt", ARC, [(-2.0, False), (-1.5, False), (-9.0, True)], [(-9.0, False), (-1.5, False), (-2.0, True)],
     [{"acc": 0.0, "acc_norm": 1.0}, {"acc": 0.0, "acc_norm": 0.0}]),
    ("xwinograd_pt", WSC, [(-1.0, False), (-2.0, False)], [(-2.0, False), (-1.0, False)], [{"acc": 1.0}, {"acc": 0.0}]),
    ("truthfulqa_pt_mc2", TRUTH, [(-900.0, False)] * 3, [(-900.0, False), (-900.0, False), (-800.0, False)],
     [{"acc": 2 / 3}, {"acc": 0.0}]),
    ("assin2_rte", PAIR, [(-2.0, False), (-1.0, False)], [(-1.0, False), (-2.0, False)], [{"f1": 1.0}, {"f1": 0.0}]),
    ("calame_pt", CALAME, [(-0.5, True)], [(-2.0, False)],
     [{"acc": 1.0, "perplexity": 1.6487212707}, {"acc": 0.0, "perplexity": 7.3890560989}]),
    ("calame_pt_generate", CALAME, [" Chave, que"], ["chaveiro"], [{"exact_match": 1.0}, {"exact_match": 0.0}]),
    ("enem_challenge_lb", FIVE, [" Resposta: B"], [" D."], [{"acc": 1.0}, {"acc": 0.0}]),
    ("tweetsentbr_lb", TWEET, ["positivo!"], ["Neutro"], [{"f1_macro": 1.0, "acc": 1.0}, {"f1_macro": 0.0, "acc": 0.0}]),
    ("oab_exams_lb", FIVE, [" B) a"], ["E"], [{"acc": 1.0}, {"acc": 0.0}]),
    ("assin2_rte_lb", PAIR, [" sim."], [" nao"], [{"f1_macro": 1.0, "acc": 1.0}, {"f1_macro": 0.0, "acc": 0.0}]),
    ("assin2_sts_lb", PAIR, [" 3,8"], ["nada"], [{"pearson": 0.0, "mse": 0.0}, {"pearson": 0.0, "mse": 1.44}]),
    ("assin2_sts", PAIR, ["4"], ["?"], [{"pearsonr": 0.0}, {"pearsonr": 0.0}]),
    ("faquad_pt", QA, [" Lúcia."], [" por ela"], [{"f1": 1.0, "exact_match": 1.0}, {"f1": 0.5, "exact_match": 0.0}]),
])
def test_answers_count_as_they_should(name, row, right, wrong, metrics, tmp_path):
    task = our_task(tmp_path, name, row)
    for answers, expected in zip((right, wrong), metrics, strict=True):
        assert scored(task, [answers])[1] == pytest.approx(expected, abs=1e-9)

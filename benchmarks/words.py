"""Measures which label is picked for a request in words: the one with the nearest text, by embedding or by letters.

    python benchmarks/words.py --dataset ../shared/data/{zheng_facs_pbmc,pbmc3k,kang_ifnb_pbmc}.h5ad \\
        --encoder all-MiniLM-L6-v2 --output lab/results/words_cpu.json
    python benchmarks/words.py --table lab/results/words_cpu.json

`--encoder` is a folder with a sentence encoder in safetensors, for transformers. Prompts are synonyms and typing
errors of each label, names with a condition, and what is no blood cell ("far"). Labels are compared as they are, with
abbreviations written out, or also with a glossary of synonyms, which lacks the prompt. The score is the cosine of
embeddings, or difflib's ratio. words_projection.py generates cells for such requests.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from itertools import product

import anndata as ad
import numpy as np
import torch
import torch.nn.functional as F
from common import add_rows, make_parser, markdown, parse, read_results


# The lineage of a population, its labels in all datasets, synonyms, and typing errors
POPULATIONS = """
monocyte: CD14+ Monocyte, CD14+ Mono, CD14 Mono
  CD14+ monocytes, monocytes, classical monocytes, CD14-positive monocyte / CD14 monocyts, CD14+ Mnoocyte
monocyte: FCGR3A+ Mono, CD16 Mono
  CD16+ monocytes, non-classical monocytes, FCGR3A monocytes, CD16-positive monocyte / CD16 monocyts, FCGR3 mono
B: CD19+ B, B
  B cells, B lymphocytes, CD19+ B cells, B-cell / B lymphocites, b cels
B: B Activated
  activated B cells, stimulated B lymphocytes, activated B-cell, germinal B cells / activted B, B cell actived
NK: CD56+ NK, NK
  natural killer cells, NK cells, killer cells, CD56+ natural killer / natural kiler cells, NK cels
T: CD8+ Cytotoxic T, CD8 T
  cytotoxic T cells, CD8+ T cells, CD8 T lymphocytes, cytotoxic lymphocytes / citotoxic T cells, CD8 Tcell
T: CD8+/CD45RA+ Naive Cytotoxic
  naive CD8 T cells, naive cytotoxic T cells, CD45RA+ CD8+ T, naive killer T cells / niave CD8 T, naive citotoxic
T: CD4+/CD45RA+/CD25- Naive T, Naive CD4 T, CD4 Naive T
  naive T cells, naive CD4+ T cells, naive helper T cells, CD4 naive lymphocytes / niave CD4 T, naiv T cells
T: CD4+/CD45RO+ Memory, Memory CD4 T, CD4 Memory T
  memory T cells, memory CD4+ T cells, memory helper T cells, CD45RO+ T cells / memmory CD4 T, memori T cells
T: CD4+ T Helper2
  T helper cells, Th2 cells, helper T lymphocytes, type 2 helper T cells / T helpr 2, Thelper2
T: CD4+/CD25 T Reg
  regulatory T cells, Tregs, Treg, suppressor T cells / regulatary T cells, T regs cels
T: T activated
  activated T cells, stimulated T lymphocytes, activated T-cell, T cells after activation / T activted, actived T cells
progenitor: CD34+
  CD34+ progenitors, hematopoietic stem cells, blood stem cells, CD34 positive cells / CD34 progenitrs, CD 34
DC: DC
  dendritic cells, myeloid dendritic cells, conventional DC, DCs / dendritc cells, dendridic cell
DC: pDC
  plasmacytoid dendritic cells, plasmacytoid DC, pDCs, interferon-producing dendritic cells \
  / plasmocytoid DC, plasmacitoid dendritic
platelet: Platelet, Mk
  platelets, megakaryocytes, thrombocytes, megakaryocyte / plateletts, megakariocytes
erythroid: Eryth
  erythrocytes, red blood cells, erythroid cells, erythroblasts / eritrocytes, red blod cells""".strip().split("\n")
LINEAGE = [line.split(": ")[0] for line in POPULATIONS[::2]]
LABELS = [line.split(": ")[1].split(", ") for line in POPULATIONS[::2]]
SYNONYMS, ERRORS = ([line.split(" / ")[i].strip().split(", ") for line in POPULATIONS[1::2]] for i in (0, 1))
POPULATION = {label: i for i, labels in enumerate(LABELS) for label in labels}
WORDINGS = {label: [label, *SYNONYMS[i], *ERRORS[i]] for label, i in POPULATION.items()}
CONDITIONS = {
    "CTRL": ["control", "untreated", "unstimulated", "resting", "without interferon"],
    "STIM": ["stimulated", "stimulated with interferon beta", "IFN-β treated", "interferon-stimulated", "treated"],
}
DESCRIPTIONS = {"CTRL": "unstimulated control", "STIM": "stimulated with interferon beta"}
FAR = (
    "neuron|hepatocyte|a red bicycle|cardiomyocyte|astrocyte|fibroblast|pancreatic beta cell|keratinocyte|microglia|"
    "oligodendrocyte|enterocyte|osteoblast|HEK293|skeletal muscle|kidney podocyte|the weather in Paris|qwerty|"
    "adipocyte|photoreceptor|goblet cell|melanoma cells|endothelial cells|sperm|liver|42|help me with my homework"
).split("|")


class Encoder:
    """Mean-pooled, normalised embeddings of a BERT model in a folder, such as all-MiniLM-L6-v2."""

    def __init__(self, folder: str):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self.known: dict[str, torch.Tensor] = {}

    def __call__(self, texts: list[str]) -> torch.Tensor:
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            self.known |= zip(new, self.embed(new))
        return torch.stack([self.known[text] for text in texts])  # (texts, 384)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
        mask = tokens["attention_mask"][..., None].float()
        mean = (self.model(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return F.normalize(mean, dim=1)


def write_out(text: str) -> str:
    """A text with abbreviations written out."""
    words = {"mono": "monocyte", "nk": "natural killer", "dc": "dendritic", "pdc": "plasmacytoid dendritic"}
    words |= {"mk": "megakaryocyte", "eryth": "erythrocyte", "reg": "regulatory", "treg": "regulatory T"}
    text = re.sub("[A-Za-z]+", lambda match: words.get(match[0].lower().removesuffix("s"), match[0]), text)
    return re.sub(r"\b([BT])\b(?![ -]?(cell|lympho))", r"\1 cell", text)


def with_synonyms(label: str, prompt: str) -> tuple[list[str], str]:
    """Adds the synonyms of a label but for the prompt itself, which a user may have from anywhere."""
    return [write_out(label), *(one for one in SYNONYMS[POPULATION[label]] if one != prompt)], write_out(prompt)


FORMS: dict[str, Callable] = {  # the texts of a label, and the prompt
    "label": lambda label, prompt: ([label], prompt),
    "written out": lambda label, prompt: ([write_out(label)], write_out(prompt)),
    "glossary": with_synonyms,
}
WAYS = list(product(FORMS, ("cosine", "difflib")))
COLUMNS, THRESHOLDS = ("right", "type_right", "lineage_right", "condition_right"), (0.3, 0.35, 0.4, 0.45, 0.5, 0.6)


def nearest(labels: list[tuple[str, str]], prompt: str, encoder: Encoder, form: str, score: str) -> tuple[int, float]:
    """The place of the label that is nearest to a prompt, and how similar they are. A label has an end, or ""."""
    similar = []
    for label, end in labels:
        texts, asked = FORMS[form](label, prompt)
        texts = [text + end for text in texts]
        ratios = [difflib.SequenceMatcher(None, asked.lower(), text.lower()).ratio() for text in texts]
        similar.append(max(ratios if score == "difflib" else (encoder(texts) @ encoder([asked])[0]).tolist()))
    return int(np.argmax(similar)), max(similar)


def questions(labels: list[str], has_condition: bool) -> Iterator[tuple[str, dict, list[tuple]]]:
    """The kind of prompts, the ends of labels by condition, and the prompts with population and condition."""
    known = sorted({POPULATION[label] for label in labels})
    yield "far", {"": ""}, [(prompt, None, "") for prompt in FAR]
    for kind, words in (("synonym", SYNONYMS), ("typing error", ERRORS)):
        yield kind, {"": ""}, [(prompt, i, "") for i in known for prompt in words[i]]
    prompts = [(f"{SYNONYMS[i][0]}, {one}", i, c) for i in known for c, words in CONDITIONS.items() for one in words]
    for kind, names in (("condition", {c: c for c in CONDITIONS}), ("condition, described", DESCRIPTIONS)):
        if has_condition:
            yield kind, {condition: f", {name}" for condition, name in names.items()}, prompts


def measure_words(dataset: str, labels: list[str], has_condition: bool, encoder: Encoder) -> Iterator[dict]:
    """The numbers of right picks, and of right and wrong ones that are as similar as a threshold."""
    for (form, score), (kind, ends, prompts) in product(WAYS, questions(labels, has_condition)):
        if form == "glossary" and len(ends) > 1:
            continue  # it would hold the prompt's name of the type
        pairs, right, similar, wrong = list(product(labels, ends)), [], [], []
        for prompt, i, condition in prompts:
            place, similarity = nearest([(label, ends[end]) for label, end in pairs], prompt, encoder, form, score)
            label, end = pairs[place]
            lineage = i is not None and LINEAGE[POPULATION[label]] == LINEAGE[i]
            facts = POPULATION[label] == i and end == condition, POPULATION[label] == i, lineage, end == condition
            right.append(facts)
            similar.append(similarity)
            wrong += [] if facts[0] else [f"{prompt} > {label}{ends[end]} ({similarity:.2f})"]
        row = {"dataset": dataset, "kind": kind, "form": form, "score": score, "number": len(prompts)}
        row |= dict(zip(COLUMNS, np.sum(right, axis=0).tolist())) | {"wrong": "; ".join(wrong)}
        for name, want in (("kept_right", True), ("kept_wrong", False)):
            own = [similarity for similarity, facts in zip(similar, right) if facts[0] == want]
            row[name] = [sum(similarity >= threshold for similarity in own) for threshold in THRESHOLDS]
        yield row


def table(results: list[dict]) -> str:
    """The fraction of right picks by kind of prompt, and of the picks that are at least as similar as a threshold."""
    words, lines, kept = [row for row in results if "kind" in row], [], []

    def total(rows: list[dict], key: str) -> np.ndarray:
        return np.sum([row[key] for row in rows], axis=0)

    for kind, (form, score) in product(dict.fromkeys(row["kind"] for row in words), WAYS):
        own = [row for row in words if (row["kind"], row["form"], row["score"]) == (kind, form, score)]
        if own and kind != "far":
            number = total(own, "number")
            lines.append([kind, form, score, str(number), *(f"{total(own, key) / number:.2f}" for key in COLUMNS)])
    for form, score in WAYS:
        own = [row for row in words if (row["form"], row["score"]) == (form, score) and "condition" not in row["kind"]]
        far, near = ([row for row in own if (row["kind"] == "far") == is_far] for is_far in (True, False))
        counts = total(near, "right"), total(near, "number") - total(near, "right"), total(far, "number")
        numbers = total(near, "kept_right"), total(near, "kept_wrong"), total(far, "kept_wrong")
        for i, threshold in enumerate(THRESHOLDS):
            kept.append([form, score, str(threshold), *(f"{x[i] / n:.2f}" for x, n in zip(numbers, counts))])
    first = markdown(["prompts", "labels", "score", "number", *COLUMNS], lines)
    return "\n\n".join(
        [first, markdown(["labels", "score", "threshold", "right kept", "wrong kept", "far kept"], kept)]
    )


def main():
    parser = make_parser(__doc__)
    parser.add_argument("--encoder", help="Folder of the sentence encoder.")
    args = parse(parser, table, needs_work_dir=False)
    encoder = Encoder(args.encoder)
    for path in args.dataset:
        obs = ad.read_h5ad(path, backed="r").obs
        labels = sorted(set(obs["cell_type"]) & set(POPULATION))
        if not any(row.get("dataset") == path.stem for row in read_results(args.output, [])):
            add_rows(args.output, measure_words(path.stem, labels, "condition" in obs, encoder))
    print(table(read_results(args.output, [])))


if __name__ == "__main__":
    main()

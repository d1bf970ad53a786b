"""The page of a head election, `<run>/gha/report.html`: what stays, how sure that is, what it saves, what to do next.

One file without scripts or anything from elsewhere, readable in light and dark.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from configs.durable import write_text
from configs.errors import UserError
from configs.schema import Config, ModelConfig
from model.attention.registry import attention_variant
from model.costs.flops import flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters
from model.gha.clustering import diversity, dunn, homogeneity, silhouette
from model.gha.pruning import cut_config
from model.gha.voting import Election, LayerElection, margin
from pretrain.backends.registry import engine
from pretrain.grouping.images import Bar, histogram_svg, margins_svg, similarity_svg, votes_svg

DOUBTFUL_SCORE = 0.01  # a lead in summed scores below this share is doubtful; votes have a standard error
_LISTED = 40  # doubtful decisions that are spelled out
_OPEN = 4  # layers that are shown open, if there are no more

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1d21; --soft: #5c6370; --line: #d9dce1; --box: #f4f5f7;
  --doubt: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --back: #15171b; --text: #e4e6ea; --soft: #a0a6b1; --line: #3a3f48; --box: #20242a; --doubt: #ff8a80 }
}
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 }
main { max-width: 1220px; margin: 0 auto; padding: 1.5rem }
h1 { font-size: 1.6rem; margin: 0 } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .4rem 0; max-width: 56rem } p.soft { color: var(--soft); max-width: none }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top }
th:first-child, td:first-child, .left { text-align: left; min-width: 4.5rem } th { font-weight: 600 }
pre { background: var(--box); padding: .7rem 1rem; border-radius: 6px; overflow-x: auto; margin: .5rem 0 }
.doubtful { color: var(--doubt); font-weight: 600 }
.row { display: grid; grid-template-columns: 5.5rem minmax(8rem, 1fr) 9rem repeat(4, 6.5rem); gap: .8rem }
.row > span { text-align: right; font-variant-numeric: tabular-nums } .row > :nth-child(-n+2) { text-align: left }
.row > :nth-child(2) { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.head { padding: .3rem .6rem .3rem 1.6rem; font-weight: 600; color: var(--soft) }
details { border-top: 1px solid var(--line) } details:last-of-type { border-bottom: 1px solid var(--line) }
summary { padding: .3rem .6rem .3rem 1.6rem; cursor: pointer; list-style: none; position: relative }
summary::before { content: "▸"; position: absolute; left: .4rem } details[open] > summary::before { content: "▾" }
summary::-webkit-details-marker { display: none } summary:hover { background: var(--box) }
.layer { display: flex; flex-wrap: wrap; gap: 1rem 1.6rem; padding: .5rem .6rem 1.5rem }
.layer > div { flex: 1 1 42rem; min-width: 0 } .layer table { margin-top: 1rem; width: 100% }
.members span { white-space: nowrap; margin-right: .8rem; color: var(--soft) }
.members .stay { color: var(--text); font-weight: 700 }
figure { margin: 0 } figcaption { color: var(--soft); font-size: .85rem }
.charts { display: flex; flex-wrap: wrap; gap: 1rem 1.5rem } .layers { overflow-x: auto }
.layers > * { min-width: 60rem }
svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif }
svg text { fill: currentColor } svg .small { font-size: 9.5px }
svg .frame { fill: none; stroke: var(--line) } svg .tick { stroke: currentColor; stroke-width: 1.5 }
svg .axis { stroke: currentColor } svg .grid { stroke: var(--line) } svg .goes { opacity: .35 }
svg .plain { fill: var(--soft) } svg .doubt { fill: var(--doubt) }
.scale { display: inline-block; width: 9rem; height: .8rem; vertical-align: middle; border: 1px solid var(--line);
  background: linear-gradient(90deg, #2166ac, #4393c3, #92c5de, #d1e5f0, #f7f7f7, #fddbc7, #f4a582, #d6604d, #b2182b) }
"""


@dataclass(frozen=True)
class Decision:
    """A group of a layer: its heads, best first, and how narrowly they were told apart.

    `margin` is the lead of the last head that stays over the first that goes, as a share of ballots (votes) or of its own score
    (scores); 1 where all stay.
    """

    members: tuple[int, ...]
    stays: tuple[int, ...]
    goes: tuple[int, ...]
    margin: float
    doubtful: bool


def write_report(folder: Path, election: Election, G_LNN: Tensor, config: Config) -> Path:
    """Write the page into a run's folder; its path. `config` is resolved, `G_LNN` the heads' Gram matrices over all ballots."""
    path = folder / "gha" / "report.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _page(folder, election, G_LNN.detach().double().cpu(), config))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def after_election(model: ModelConfig, election: Election) -> ModelConfig:
    """The model once the heads are cut."""
    return cut_config(model, [layer.kept for layer in election.layers])


def decisions(election: Election, layer: LayerElection) -> list[Decision]:
    """One for each group of a layer, in their order."""
    found = []
    for group in range(election.groups):
        members = [head for head, label in enumerate(layer.labels) if label == group]
        ranked = sorted(members, key=lambda head: (-layer.scores[head], head))
        stays = tuple(head for head in ranked if head in layer.kept)
        goes = tuple(head for head in ranked if head not in layer.kept)
        lead, doubtful = 1.0, False
        if stays and goes:
            lead, doubtful = _lead(election, layer.scores[stays[-1]], layer.scores[goes[0]])
        found.append(Decision(tuple(ranked), stays, goes, lead, doubtful))
    return found


def savings(config: Config, election: Election) -> dict[str, tuple[int, int]]:
    """Figure → before and after pruning, by the formulas of model/costs."""
    models, length = (config.model, after_election(config.model, election)), config.data.sequence_length

    def pair(values: Iterable[int]) -> tuple[int, int]:
        before, after = values
        return before, after

    return {
        "Heads of a layer": pair(model.num_heads for model in models),
        "Parameters of an attention layer": pair(parameters(model)["attention"] // model.num_layers for model in models),
        "Parameters of the model": pair(sum(parameters(model).values()) for model in models),
        "KV cache, bytes per token (bf16)": pair(kv_cache_bytes_per_token(model) for model in models),
        f"Training FLOPs per token (sequences of {length:,})": pair(flops_per_token(model, length) for model in models),
    }


def _lead(election: Election, last: float, first_out: float) -> tuple[float, bool]:
    """The margin, and whether it is doubtful: for votes, below two standard errors of the difference of two shares."""
    lead = margin(last, first_out, election.ballot, election.ballots)
    if election.ballot == "scores":
        return lead, lead < DOUBTFUL_SCORE
    shares = (last + first_out) / election.ballots
    return lead, lead <= 2 * math.sqrt(max(0.0, shares - lead**2) / election.ballots)


def _page(folder: Path, election: Election, G_LNN: Tensor, config: Config) -> str:
    by_layer = [decisions(election, layer) for layer in election.layers]
    title = f"Head election of {folder.resolve().name}, step {election.step}"
    model, groups, stays = config.model, election.groups, election.heads_per_group
    heads = f"{stays} head of each stays" if stays == 1 else f"{stays} heads of each stay"
    facts = (
        f"{model.attention}, {model.num_layers} layers × {model.num_heads} heads of {model.head_width} · feature map "
        f"{election.feature_map} · {groups} groups in a layer, {heads} · {election.ballots:,} ballots, counted as "
        f"{election.ballot}"
    )
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>',
        f'<meta name="viewport" content="width=device-width">\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>',
        f'<h1>{escape(title)}</h1>\n<p class="soft">{escape(facts)}</p>',
        _savings(config, election),
        _next(folder, config, election.step),
        _reading(election, config),
        _margins(election, by_layer),
        _layers(election, by_layer, G_LNN),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _savings(config: Config, election: Election) -> str:
    rows = [
        f"<tr><td>{escape(name)}</td><td>{before:,}</td><td>{after:,}</td><td>{1 - after / before:.1%}</td></tr>"
        for name, (before, after) in savings(config, election).items()
    ]
    head = '<tr><th scope="col">Figure</th><th scope="col">Before</th><th scope="col">After</th><th scope="col">Saved</th></tr>'
    note = _what_stays(config.model, after_election(config.model, election))
    return f"<h2>What cutting saves</h2>\n<table>{head}{''.join(rows)}</table>\n<p>{escape(note)}</p>"


def _what_stays(before: ModelConfig, after: ModelConfig) -> str:
    """Which parts of an attention layer do not shrink with its heads."""
    variant, width, name = attention_variant(before.attention), before.hidden_size + before.bias, before.attention
    always = "Embeddings, MLPs and norms stay as they are. Counted by formulas, not measured."
    if variant.shared(before):
        return (
            f"{name} projects queries, keys and values once for all heads: these {variant.shared(before) * width:,} parameters "
            "of a layer and the cache of keys and values stay. What goes are rows of the output projection and embeddings of "
            f"heads. {always}"
        )
    if variant.kv_heads(before) == variant.kv_heads(after):
        stay = 2 * variant.kv_heads(before) * before.head_width * width
        return (
            f"{name} shares keys and values between heads: their {stay:,} parameters of a layer and their cache stay. What "
            f"goes are the queries of cut heads and their rows of the output projection. {always}"
        )
    return f"In {name} every head has its own projections and cache: all of that shrinks with the heads. {always}"


def _next(folder: Path, config: Config, step: int) -> str:
    launcher = engine(config.backend).launcher
    pruned, steps = folder / "pruned", config.training.steps
    train = f"{launcher} launch/pretrain.py --config {{}} --resume=auto"
    if config.gha.stage == "schedule":
        text = f"The run cuts the heads itself and trains on in {pruned}, without the constraint. After an interruption:"
        commands = train.format(shlex.quote(str(folder / "config.yaml")))
    else:
        text = "The first command cuts the heads out of the checkpoint, the second trains the smaller model on."
        cut = f"python launch/prune.py {shlex.quote(str(folder))}\n"
        commands = cut + train.format(shlex.quote(str(pruned / "config.yaml")))
        if step >= steps:
            text += f" N is its last step: the {steps:,} of the configuration are done."
            commands += " --training.steps=N"
    return f"<h2>Next</h2>\n<p>{escape(text)}</p>\n<pre><code>{escape(commands)}</code></pre>"


def _reading(election: Election, config: Config) -> str:
    votes, several = election.ballot == "votes", election.heads_per_group > 1
    eta = "cosine to the group's centre" if config.gha.loss == "continuous" else "probability of its group"
    rule = f"gave one vote to the head of each group with the highest {eta}" if votes else f"gave every head its {eta} as score"
    best = f"{election.heads_per_group} best of a group stay" if several else "best of a group stays"
    whole = "all ballots" if votes else "its score"
    doubt = (
        "two standard errors of the count or less, so that other batches might have chosen differently"
        if votes
        else f"below {DOUBTFUL_SCORE:.0%}"
    )
    scale = '<span class="scale" role="img" aria-label="blue, white, red"></span>'
    texts = {
        "Who stays": f"Heads whose feature maps are alike form a group. The weights stood still, and each batch {rule}. The "
        f"{best}; places that a small group leaves go to the best of the layer's other heads, so that all layers keep equally "
        "many. Of equal heads the first stays.",
        "Margin": f"The lead of the last head of a group that stays over the first that goes, as a share of {whole}; doubtful "
        f"if it is {doubt}. The doubt is which head stands best for its group; two that are nearly equal may serve as well.",
        "Similarities": f"Cosines of the maps of two heads, sorted by group: −1 {scale} 1. Good groups are red squares on the "
        "diagonal, with paler colours elsewhere. Ticks at the sides mark heads that stay.",
        "Figures of a layer": "Homogeneity: mean cosine of a head and its group's centre; higher is better. Diversity: mean "
        "cosine of two centres; lower is better. Silhouette, from −1 to 1, and Dunn's index: how compact and separate groups "
        "are; higher is better.",
        "Numbers": "Layers, heads and groups count from 0.",
    }
    return "<h2>How to read this page</h2>\n" + "\n".join(f"<p><b>{name}.</b> {text}</p>" for name, text in texts.items())


def _margins(election: Election, by_layer: list[list[Decision]]) -> str:
    """Histogram of margins, margins by layer, and the doubtful ones in words."""
    open_margins = [decision.margin for layer in by_layer for decision in layer if decision.goes and decision.stays]
    settled = sum(len(layer) for layer in by_layer) - len(open_margins)
    upper = _upper(open_margins)
    dots = [
        [(_decision(number, group, one), one.margin, one.doubtful) for group, one in enumerate(layer) if one.goes and one.stays]
        for number, layer in enumerate(by_layer)
    ]
    doubtful = [(layer, group, one) for layer, row in enumerate(by_layer) for group, one in enumerate(row) if one.doubtful]
    doubtful.sort(key=lambda entry: entry[2].margin)
    lines = [f"<li>{escape(_decision(*entry))}</li>" for entry in doubtful[:_LISTED]]
    more = f"<p>and {len(doubtful) - _LISTED} more</p>" if len(doubtful) > _LISTED else ""
    listed = f"<details><summary>Doubtful decisions, narrowest first</summary><ul>{''.join(lines)}</ul>{more}</details>"
    layers = sorted({layer for layer, _, _ in doubtful})
    where = f"{'layer' if len(layers) == 1 else 'layers'} {_ranges(layers)}"
    doubts = f'<span class="doubtful">{len(doubtful)} of {len(open_margins)} decisions are doubtful</span>, in {where}.'
    verdict = f"<p>{doubts if doubtful else f'None of {len(open_margins)} decisions is doubtful.'}</p>"
    note = f"<p>{settled} groups had nothing to decide: all their heads stay.</p>" if settled else ""
    charts = histogram_svg(open_margins, upper, "Histogram of margins over the groups of all layers")
    charts += margins_svg(dots, upper, "Margins of the groups of each layer")
    return f'<h2>How sure it is</h2>\n{verdict}{note}<div class="charts">{charts}</div>{listed if doubtful else ""}'


def _decision(layer: int, group: int, decision: Decision) -> str:
    return (
        f"layer {layer}, group {group}: head {decision.stays[-1]} before head {decision.goes[0]}, margin {decision.margin:.1%}"
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as text, such as 0–3, 7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def _upper(margins: Sequence[float]) -> float:
    """Where the axis of margins ends."""
    largest = max(margins, default=1.0)
    return next((end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if largest <= end), 1.0)


def _layers(election: Election, by_layer: list[list[Decision]], G_LNN: Tensor) -> str:
    labels_LN = torch.tensor([layer.labels for layer in election.layers])
    quality = [figure(G_LNN, labels_LN, election.groups).tolist() for figure in (homogeneity, diversity, silhouette, dunn)]
    names = ("Layer", "Heads that stay", "Smallest margin", "Homogeneity", "Diversity", "Silhouette", "Dunn")
    parts = [f'<div class="row head">{"".join(f"<span>{name}</span>" for name in names)}</div>']
    shown = " open" if len(election.layers) <= _OPEN else ""
    for number, (layer, groups) in enumerate(zip(election.layers, by_layer, strict=True)):
        smallest = min(one.margin for one in groups)
        doubt = ' class="doubtful"' if any(one.doubtful for one in groups) else ""
        figures = "".join(f"<span>{_number(values[number])}</span>" for values in quality)
        kept = ", ".join(map(str, layer.kept))
        line = f"<span>Layer {number}</span><span>{kept}</span><span{doubt}>{smallest:.1%}</span>{figures}"
        parts.append(f'<details id="layer-{number}"{shown}><summary><span class="row">{line}</span></summary>')
        parts.append(f'<div class="layer">{_layer(number, election, layer, groups, G_LNN[number])}</div></details>')
    return f'<h2>Layers</h2>\n<div class="layers">{"".join(parts)}</div>'


def _layer(number: int, election: Election, layer: LayerElection, groups: list[Decision], G_NN: Tensor) -> str:
    order = sorted(range(len(layer.labels)), key=lambda head: (layer.labels[head], head))
    bars = [Bar(head, layer.labels[head], layer.scores[head], head in layer.kept) for head in order]
    unit = "votes" if election.ballot == "votes" else "score"
    picture = similarity_svg(G_NN, layer.labels, layer.kept, f"Cosine similarities of the heads of layer {number}, by group")
    votes = votes_svg(bars, f"{unit} of the heads of layer {number}, by group; pale heads go", unit)
    head = '<tr><th scope="col">Group</th><th scope="col" class="left">Stay</th>'
    head += f'<th scope="col" class="left">Members ({unit})</th><th scope="col">Margin</th></tr>'
    rows = "".join(_group(group, decision, layer, unit) for group, decision in enumerate(groups))
    caption = f"{unit.capitalize()} by head; strong colours and bold numbers stay"
    return (
        f"<figure>{picture}<figcaption>Similarity of maps, by group</figcaption></figure>"
        f"<div><figure>{votes}<figcaption>{caption}</figcaption></figure><table>{head}{rows}</table></div>"
    )


def _group(group: int, decision: Decision, layer: LayerElection, unit: str) -> str:
    def member(head: int) -> str:
        score = f"{layer.scores[head]:.0f}" if unit == "votes" else f"{layer.scores[head]:.4g}"
        return f'<span class="{"stay" if head in layer.kept else "go"}">{head} ({score})</span>'

    members = " ".join(member(head) for head in decision.members)
    stays = ", ".join(map(str, sorted(decision.stays))) or "none"
    margin = f"{decision.margin:.1%}" if decision.goes and decision.stays else "all stay" if decision.stays else "–"
    doubt = ' class="doubtful"' if decision.doubtful else ""
    return (
        f'<tr><td>{group}</td><td class="left">{stays}</td><td class="left members">{members}</td><td{doubt}>{margin}</td></tr>'
    )


def _number(value: float) -> str:
    return "∞" if value == math.inf else "–" if math.isnan(value) else f"{value:.3f}"

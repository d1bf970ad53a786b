"""The page of a head election, `<run>/gha/report.html`: which heads stay, how sure that is, what it saves, what to do next.

One file without scripts or external resources, for light and dark displays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from configs.durable import write_text
from configs.errors import UserError
from configs.schema import Config, ModelConfig
from model.attention.registry import layer_configs, variant_of
from model.gha.clustering import diversity, dunn, homogeneity, silhouette
from model.gha.voting import Election, LayerElection
from pretrain.grouping.report.charts import Bar, histogram_svg, margins_svg, similarity_svg, votes_svg
from pretrain.grouping.report.decisions import DOUBTFUL_SCORE, Decision, after_election, decisions, savings
from pretrain.grouping.report.outcome import REPORT, sections
from pretrain.report.page import html_page

_LISTED = 40  # most doubtful decisions listed
_OPEN = 4  # up to this many layers, all are expanded
_STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")


def write_report(folder: Path, election: Election, G_LNN: Tensor, config: Config) -> Path:
    """Write the page into a run's folder and return its path. `G_LNN`: Gram matrices over all ballots; `config` is resolved."""
    path = folder / REPORT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _page(folder, election, G_LNN.detach().double().cpu(), config))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    return path


def _page(folder: Path, election: Election, G_LNN: Tensor, config: Config) -> str:
    by_layer = [decisions(election, layer) for layer in election.layers]
    title = f"Head election of {folder.resolve().name}, step {election.step}"
    model, groups, stays = config.model, election.groups, election.heads_per_group
    heads = f"{stays} head of each stays" if stays == 1 else f"{stays} heads of each stay"
    facts = (
        f"{model.attention_words}, {model.num_layers} layers × {model.num_heads} heads of {model.head_width} · feature map "
        f"{election.feature_map} · {groups} groups in a layer, {heads} · {election.ballots:,} ballots, counted as "
        f"{election.ballot}"
    )
    parts = [
        _savings(config, election),
        *sections(folder, election.step, config, pruned=None).values(),
        _reading(election, config),
        _margins(by_layer),
        _layers(election, by_layer, G_LNN),
    ]
    return html_page(title, facts, parts, _STYLE)


def _savings(config: Config, election: Election) -> str:
    rows = [
        f"<tr><td>{escape(name)}</td><td>{before:,}</td><td>{after:,}</td><td>{1 - after / before:.1%}</td></tr>"
        for name, (before, after) in savings(config, election).items()
    ]
    head = '<tr><th scope="col">Figure</th><th scope="col">Before</th><th scope="col">After</th><th scope="col">Saved</th></tr>'
    note = _what_stays(config.model, after_election(config.model, election))
    return f"<h2>What pruning saves</h2>\n<table>{head}{''.join(rows)}</table>\n<p>{escape(note)}</p>"


def _what_stays(before: ModelConfig, after: ModelConfig) -> str:
    """Which parts of an attention layer do not shrink with its heads."""
    always = "Embeddings, MLPs and norms stay as they are. Counted by formulas, not measured."
    notes = [_what_stays_in(*layers) for layers in dict.fromkeys(zip(layer_configs(before), layer_configs(after), strict=True))]
    return " ".join([*notes, always])


def _what_stays_in(before: ModelConfig, after: ModelConfig) -> str:
    """The same of one layer."""
    name, old, new = before.attention, variant_of(before), variant_of(after)
    pairs = zip(old.projections(before).values(), new.projections(after).values(), strict=False)
    stay = sum(one.values(before.hidden_size, before.bias) for one, other in pairs if one == other)
    cached, kept = old.cached(before).values, new.cached(after).values
    cache = f"of its {cached:,} cached values of a token {kept:,} stay" if kept < cached else "its cache stays"
    if stay:
        return (
            f"Several heads of {name} read the same projections: of these {stay:,} parameters of a layer stay, and {cache}. "
            "Pruning removes what belongs to pruned heads alone, such as their rows of the output projection."
        )
    return f"Every projection of {name} shrinks with its heads, and {cache}."


def _reading(election: Election, config: Config) -> str:
    votes, several = election.ballot == "votes", election.heads_per_group > 1
    eta = "cosine to the group's centre" if config.gha.loss == "continuous" else "probability of its group"
    rule = f"gave one vote to the head of each group with the highest {eta}" if votes else f"gave every head its {eta} as score"
    best = f"The {election.heads_per_group} best heads of a group stay" if several else "The best head of a group stays"
    total = "all ballots" if votes else "the score of the head that stays"
    doubt = "of at most two standard errors of the count" if votes else f"below {DOUBTFUL_SCORE:.0%}"
    scale = '<span class="scale" role="img" aria-label="blue, white, red"></span>'
    texts = {
        "Who stays": "Heads with similar feature maps form a group. During the vote the weights did not change, and each "
        f"batch {rule}. {best}, the others are pruned. If a group is too small, the best of the layer's other heads fill its "
        "places, so that every layer keeps the same number of heads. Of heads with equal scores, the one with the lowest "
        "number stays.",
        "Margin": "The lead of the last head of a group that stays over the first that is pruned, as a share of "
        f"{total}. A margin {doubt} is doubtful: other batches might have chosen the other head. Such a decision need not be "
        "a bad one, because two heads that are nearly equal represent their group equally well.",
        "Similarities": f"Cosines of the feature maps of two heads, sorted by group: −1 {scale} 1. Good groups are red "
        "squares on the diagonal, with paler colours elsewhere. Ticks at the sides mark heads that stay.",
        "Figures of a layer": "Homogeneity is the mean cosine of a head and the centre of its group; higher is better. "
        "Diversity is the mean cosine of two centres; lower is better. Silhouette (from −1 to 1) and Dunn's index say how "
        "compact and how far apart groups are; higher is better.",
        "Numbers": "Layers, heads and groups count from 0.",
    }
    return "<h2>How to read this page</h2>\n" + "\n".join(f"<p><b>{name}.</b> {text}</p>" for name, text in texts.items())


def _margins(by_layer: list[list[Decision]]) -> str:
    """Histogram of margins, margins by layer, and a list of the doubtful ones."""
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
    return f'<h2>How certain the vote is</h2>\n{verdict}{note}<div class="charts">{charts}</div>{listed if doubtful else ""}'


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
    votes = votes_svg(bars, f"{unit} of the heads of layer {number}, by group; pale heads are pruned", unit)
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

"""The page of a study: one file to look at, without scripts or external resources. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from configs.words import counted
from pretrain.report.page import html_page
from pretrain.report.plot import STYLE, compact, legend
from pretrain.studies.charts import Charts, pool_charts, pool_legend
from pretrain.studies.collected import Fit
from pretrain.studies.findings import findings, matched
from pretrain.studies.groups import Group, Part
from pretrain.studies.pool import Member, pools
from pretrain.studies.spread import Spread
from pretrain.studies.wording import difference_words, figure, law_words

_OPEN = 16  # a table of up to so many lines is expanded
PAGE_STYLE = (
    STYLE
    + """.wide { overflow-x: auto } .wide table { font-size: .88rem } .wide td, .wide th { white-space: nowrap }
nav { margin: .6rem 0 } nav a { margin-right: 1rem } a { color: inherit }
ul { margin: .4rem 0; padding-left: 1.3rem; max-width: 60rem } li { margin: .15rem 0 }
.error { white-space: pre-wrap; overflow-wrap: anywhere; font-family: ui-monospace, monospace; font-size: .85rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem } section > h2 { border-top: 2px solid var(--line); padding-top: 1rem }
.charts figure { flex: 0 1 570px; min-width: 0 }
figure .legend { margin: 0 0 .5rem 58px; font-size: .8rem } figcaption { padding: .2rem 0 }
"""
)
_READING = {
    "Spreads": "± after a mean is the standard deviation over seeds, with the number of seeds in brackets. Between two means "
    "it is the half of a 95 % interval (Student's t, of pairs of equal seeds where there are two or more, else Welch's). Two "
    "means are called separated if that interval leaves out zero. One seed alone has no spread and separates nothing. Many "
    "comparisons are shown: of twenty that differ by nothing, one is separated by chance.",
    "Equal tokens, equal time": "All finished runs of a part are compared at the most tokens, and at the most seconds of "
    "training steps, that all of them have, between validations linear in the logarithm. At equal time a slower run has not "
    "yet decayed its learning rate. Seconds are those of this machine at the load that it had.",
    "Best learning rate": "Where a part tries several, tables and plots show the one with the lowest mean loss. It was chosen "
    "by the same loss that is shown, which flatters it a little.",
    "Retention (PRR)": "1 − (ppl − ppl of mha) / ppl of mha, of final perplexities, seed by seed, with as many heads.",
    "Elasticity (PEoP)": "% of perplexity gained over sha for each % of attention parameters more than sha has.",
    "Query freedom": "Of how many independent linear functions of a token the queries of a layer are made.",
    "Laws": "L = E + A x^−α by Huber's loss on logarithms; bands by a bootstrap over runs.",
}


def study_page(name: str, parts: Sequence[Part], fits: Sequence[Sequence[Fit]]) -> str:
    """The page as text."""
    runs = [run for part in parts for run in part.runs]
    finished = sum(run.usable for run in runs)
    left = "" if finished == len(runs) else f"; {len(runs) - finished} are missing in what follows"
    facts = f"{finished} of {counted(len(runs), 'run')} in {counted(len(parts), 'part')} are finished{left}"
    links = "".join(f'<a href="#part-{number}">{escape(part.name)}</a>' for number, part in enumerate(parts))
    sections = [f"<nav>{links}</nav>", _overview(parts), _reading(), *map(_pool, pools(parts))]
    sections += [
        "\n".join(_part(number, part, of_part)) for number, (part, of_part) in enumerate(zip(parts, fits, strict=True))
    ]
    return html_page(f"Study {name}", facts, sections, PAGE_STYLE)


def _overview(parts: Sequence[Part]) -> str:
    head = row(("Part", "Runs", "Finished", "Running", "Stopped", "Failed", "Missing"), "th")
    rows = []
    for part in parts:
        statuses = [run.status for run in part.runs]
        counts = [statuses.count(status) for status in ("finished", "running", "stopped", "failed", "missing")]
        rows.append(row((part.name, str(len(statuses)), *map(str, counts))))
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _reading() -> str:
    texts = "".join(f"<p><b>{name}.</b> {escape(text)}</p>" for name, text in _READING.items())
    return f"<details><summary>How to read this page</summary>{texts}</details>"


def _pool(members: Sequence[Member]) -> str:
    """Groups of several parts in one table and on one set of pictures."""
    names = (
        *("Part and group", "Runs", "Loss", "Minus the lowest (95 %)", "Heads", "Parameters", "Cache, bytes a token"),
        *("Query freedom", "Tokens/s"),
    )
    rows = [row(names, "th")]
    for member in members:
        sizes = member.group.runs[0].sizes
        assert sizes is not None
        above = member.above(members[0]) if member is not members[0] else None
        figures = [figure(member.group, name) for name in ("parameters", "kv_bytes", "query_freedom", "tokens_per_second")]
        heads = f"{sizes.num_heads} × {sizes.head_dim}"
        rows.append(row((member.label, str(member.loss.count), member.loss.words(), difference_words(above), heads, *figures)))
    count = counted(len({member.part.name for member in members}), "part")
    tokens = figure(members[0].group, "tokens")
    pictures = f"{legend(pool_legend(members))}{_pictures(pool_charts(members))}"
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    heading = f"<h2>Across {count}, {tokens} tokens of the same text</h2>"
    return f"<section>{heading}{_list(matched(members))}{table}{pictures}</section>"


def _part(number: int, part: Part, fits: Sequence[Fit]) -> Iterator[str]:
    yield f'<section id="part-{number}"><h2>{escape(part.name)}</h2><p class="soft">{escape(_facts(part))}</p>'
    yield _list(findings(part))
    if part.tuned:
        charts = Charts(part)
        if len(part.tuned) > 1:
            yield legend(charts.legend())
            yield _pictures([*charts.against_sizes(), *charts.against_heads()])
        for title, pictures in (
            ("Other axes", charts.of_axes()),
            ("Learning rates", charts.basins()),
            ("Laws", charts.laws(fits)),
        ):
            if drawn := list(pictures):
                yield f"<h3>{title}</h3>"
                yield _pictures(drawn)
                if title == "Laws":
                    yield _list(map(law_words, fits))
        yield from _folded("Losses along the runs", _pictures([*charts.courses("tokens"), *charts.courses("seconds")]), False)
        if alike := list(charts.alike()):
            yield from _folded("How alike heads are", _pictures(alike), False)
        yield from _folded("All figures", _figures(part), len(part.tuned) <= _OPEN)
        if sets := _sets(part):
            yield from _folded("Validation sets", sets, len(part.tuned) <= _OPEN)
        if len(part.groups) > len(part.tuned):
            yield from _folded("All learning rates", _rates(part), False)
    yield from _failures(part)
    yield "</section>"


def _facts(part: Part) -> str:
    tokens, seconds = part.common("tokens"), part.common("seconds")
    equal = f" Equal tokens: {compact(tokens)}; equal time: {seconds:,.0f} s of steps." if tokens and seconds else ""
    kind = (
        "" if part.held_out else " The runs have no validation: losses are those of training, of the last tenth of the steps."
    )
    return f"{part.counts()}.{equal}{kind}"


def _figures(part: Part) -> str:
    """A line for each group at its best learning rate."""
    names = (
        *("Group", "Runs", "Loss", f"Minus {part.compared_to} (95 %)", "Bits per byte", "At equal tokens", "At equal time"),
        *("Learning rate", "Parameters", "Of mha's", "In attention", "Cache, bytes a token", "Query freedom", "FLOPs a token"),
        *("Tokens/s", "GiB", "Seconds", "Tokens", "FLOPs", "Training loss", "PRR", "PEoP"),
    )
    rows = [row(names, "th"), *(row(_cells(part, group)) for group in part.tuned)]
    return f'<div class="wide"><table>{"".join(rows)}</table></div>'


def _cells(part: Part, group: Group) -> Iterator[str]:
    yield from (group.label, str(len(group.runs)), _words(part.loss(group)), difference_words(part.compared(group)))
    yield _words(group.figures.get("bits_per_byte"))
    yield from (_words(part.at_equal(group, "tokens")), _words(part.at_equal(group, "seconds")))
    yield f"{group.rate:g}" + (" (edge)" if part.at_edge(group) else "")
    yield figure(group, "parameters")
    reference = part.reference(group, "mha")
    if reference is None or reference is group:
        yield "–"
    else:
        share = group.figures["parameters"].mean / reference.figures["parameters"].mean
        yield f"{100 * share:.1f} %" + (", equal" if part.same_parameters(group, reference) else "")
    for name in ("attention_parameters", "kv_bytes", "query_freedom", "flops_per_token"):
        yield figure(group, name)
    for name in ("tokens_per_second", "memory_gib", "wall_seconds", "tokens", "flops"):
        yield figure(group, name)
    for found in (group.figures.get("training_loss"), part.retention(group), part.elasticity(group)):
        yield _words(found)


def _rates(part: Part) -> str:
    head = row(("Group", "Runs", "Loss", "Minus the best (95 %)"), "th")
    best = {group.rest("rate"): group for group in part.tuned}
    rows = []
    for group in part.groups:
        chosen = best[group.rest("rate")]
        away = "the best" if chosen is group else difference_words(part.against(group, chosen))
        rows.append(row((group.label, str(len(group.runs)), _words(part.loss(group)), away)))
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _sets(part: Part) -> str:
    """Bits per byte, or losses where there are none, of each named validation set."""
    found = {group: group.sets() for group in part.tuned}
    names = list(dict.fromkeys(name for sets in found.values() for name in sets))
    if not names:
        return ""
    has_bits = all(sets.get(name, {}).get("bits_per_byte") for sets in found.values() for name in names)
    kind = "bits_per_byte" if has_bits else "loss"
    head = row(("bits per byte" if has_bits else "loss", *names), "th")
    rows = [row((group.label, *(_words(sets.get(name, {}).get(kind)) for name in names))) for group, sets in found.items()]
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _failures(part: Part) -> Iterator[str]:
    failed = [run for run in part.runs if run.status == "failed" or run.error]
    if failed:
        rows = "".join(
            f'<li>{escape(run.name)}<div class="error">{escape(run.error or "no message")}</div></li>' for run in failed
        )
        yield f'<h3 class="doubtful">{counted(len(failed), "failed run")}</h3><ul>{rows}</ul>'


def _words(found: Spread | None) -> str:
    return "–" if found is None else found.words()


def row(cells: Iterable[str], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"


def _list(lines: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f"<ul>{items}</ul>" if items else ""


def _pictures(figures: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>'


def _folded(title: str, content: str, shown: bool) -> Iterator[str]:
    yield f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>{content}</details>"

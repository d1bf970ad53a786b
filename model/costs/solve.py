"""Models of equal cost: a configuration is changed until it has the parameters, FLOPs or cache of another. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, get_args

from configs.errors import UserError
from configs.schema import ModelConfig
from model.attention.faults import attention_faults
from model.attention.registry import attention_variant
from model.costs.flops import flops_per_token
from model.costs.memory import kv_cache_bytes_per_token
from model.costs.parameters import parameters

What = Literal["parameters", "flops", "kv_bytes"]
By = Literal["ffn", "layers", "heads"]
COSTS: tuple[What, ...] = get_args(What)
WAYS: tuple[By, ...] = get_args(By)
TOLERANCE = 0.005
FFN = "ffn_hidden_size"
MULTIPLES = (64, 32, 16, 8, 4, 2, 1)  # a width is one of the first that comes close enough, as kernels like round widths
CACHED = ("num_seeds", "num_kv_heads", "latent_dim")  # fields that decide how much a variant caches, if it reads them
TELLING = 64  # if this value of a field costs as much as 1, the cost does not depend on it
FARTHEST = 1024  # values that are tried on each side of the best one
FIELDS: dict[By, str] = {"ffn": FFN, "layers": "num_layers", "heads": "num_heads"}
Fits = Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Matched:
    """`config` costs what is wanted, within TOLERANCE; `changes` are its fields that were set, `before` is as it was."""

    what: What
    before: ModelConfig
    config: ModelConfig
    changes: dict[str, int]
    cost: int
    wanted: int

    def words(self) -> str:
        """What was changed, and both costs: model.ffn_hidden_size 1024 → 1216; 3.50 M vs 3.49 M (+0.12 %)."""
        shown = [(name, _shown(self.before, name), _shown(self.config, name)) for name in self.changes]
        changed = [f"model.{name} {before} → {now}" for name, before, now in shown if before != now]
        off = f"{100 * (self.cost / self.wanted - 1):+.2f} %".replace("-", "−")
        costs = f"{number(self.cost, self.what)} vs {amount(self.wanted, self.what)} ({off})"
        return f"{', '.join(changed) or 'nothing to change'}; {costs}"


def cost(config: ModelConfig, what: What, sequence_length: int) -> int:
    """All parameters of a resolved model; FLOPs of a training token in sequences of this length; or bytes of cache a token."""
    if what == "parameters":
        return sum(parameters(config).values())
    return flops_per_token(config, sequence_length) if what == "flops" else kv_cache_bytes_per_token(config)


def number(value: int, what: What) -> str:
    """A cost for people."""
    return f"{value / 1e6:,.2f} M" if value >= 1e6 and what != "kv_bytes" else f"{value:,}"


def amount(value: int, what: What) -> str:
    """A cost and its unit."""
    return number(value, what) + {"parameters": "", "flops": " FLOPs a token", "kv_bytes": " bytes a token"}[what]


def match(
    config: ModelConfig,
    target: ModelConfig,
    what: What,
    sequence_length: int,
    by: By | None = None,
    fits: Fits = lambda model: True,
) -> Matched:
    """`config` changed until it costs what `target` does, within TOLERANCE; as it is if it does. UserError if it cannot.

    Both have a vocab_size; where they differ, so do the costs of their embeddings. `by` is what changes:

    ffn       the MLP's width, to a multiple of MULTIPLES; the default for parameters and FLOPs. The cache does not need it.
    layers    the depth, to the one that comes nearest; what is left of parameters or FLOPs goes into the MLP's width.
    heads     the query heads at the head_dim of `config`, likewise.
    None      for the cache: what its variants cache by (CACHED), else the query heads.

    `fits` says which models the run can have, such as those that tensor-parallel ranks can shard.
    """
    search = _Search(what, sequence_length, cost(target, what, sequence_length), fits)
    found = config
    if not search.close(config):
        found = search.cache(config, by) if what == "kv_bytes" else search.widths(config, by)
    changes = {name: value for name in ModelConfig.model_fields if (value := getattr(found, name)) != getattr(config, name)}
    if "num_heads" in changes:  # its default would follow them
        changes["head_dim"] = found.head_width
    return Matched(what, config, found, changes, search.cost(found), search.wanted)


@dataclass(frozen=True)
class _Search:
    """Looks for the values of fields of which a cost grows."""

    what: What
    sequence_length: int
    wanted: int
    fits: Fits

    def cost(self, config: ModelConfig) -> int:
        return cost(config, self.what, self.sequence_length)

    def off(self, config: ModelConfig) -> int:
        return abs(self.cost(config) - self.wanted)

    def close(self, config: ModelConfig) -> bool:
        return self.off(config) <= TOLERANCE * self.wanted

    def valid(self, config: ModelConfig) -> bool:
        return not [*config.faults(), *attention_faults(config)] and self.fits(config)

    def widths(self, config: ModelConfig, by: By | None) -> ModelConfig:
        """By layers or heads first, if asked for; the MLP's width does the rest."""
        if by in ("layers", "heads"):
            nearest = self.nearest(_fixed(config), FIELDS[by])
            if nearest is None:
                raise UserError(f"no model.{FIELDS[by]} is one that the run can have; {self._other_ways(by)}")
            if self.close(nearest):
                return nearest
            config = nearest
        found = self.nearest(config, FFN, close=True)
        if found is None:
            raise self._no_width(config, by)
        return found

    def cache(self, config: ModelConfig, by: By | None) -> ModelConfig:
        """By fields that decide how much is cached, the first that can."""
        if by == "ffn":
            raise UserError(f"the cache does not depend on model.{FFN}; {self._other_ways(by)}")
        read = {option for name in config.pattern for option in attention_variant(name).options}
        fields = [FIELDS[by]] if by else [name for name in CACHED if name in read] or [FIELDS["heads"]]
        for field in fields:
            found = self.nearest(_fixed(config), field, close=True)
            if found is not None:
                return found
        raise self._no_cache(_fixed(config), fields, by)

    def nearest(self, config: ModelConfig, field: str, close: bool = False) -> ModelConfig | None:
        """With the value that costs nearest, of those that the model can have; `close`: the roundest that is close, or None."""
        if not self.depends(config, field):
            return None
        last, steps = _largest(config, field), _steps(config, field)
        below = self._below(config, field, last)
        for step in steps if close else steps[-1:]:
            start = below // step * step
            sides = range(start, 0, -step), range(start + step, last + 1, step)
            found = [one for side in sides if (one := self._first(config, field, side, close)) is not None]
            if found:
                return min(found, key=self.off)
        return None

    def depends(self, config: ModelConfig, field: str) -> bool:
        """Whether the cost depends on a field."""
        last = min(TELLING, _largest(config, field))
        return self.cost(_with(config, field, 1)) != self.cost(_with(config, field, last))

    def _first(self, config: ModelConfig, field: str, values: Iterable[int], close: bool) -> ModelConfig | None:
        for value in islice(values, FARTHEST):
            one = _with(config, field, value)
            if close and not self.close(one):
                return None  # values farther away are farther off
            if self.valid(one):
                return one
        return None

    def _below(self, config: ModelConfig, field: str, last: int) -> int:
        """The largest value that costs no more than is wanted; 0 if there is none."""
        high = 1
        while high <= last and self.cost(_with(config, field, high)) <= self.wanted:
            high *= 2
        low, high = high // 2, min(high, last + 1)
        while high - low > 1:
            middle = (low + high) // 2
            below = self.cost(_with(config, field, middle)) <= self.wanted
            low, high = (middle, high) if below else (low, middle)
        return low

    def _no_width(self, config: ModelConfig, by: By | None) -> UserError:
        smallest, nearest, wanted = self.cost(_with(config, FFN, 1)), self.nearest(config, FFN), amount(self.wanted, self.what)
        if smallest > self.wanted:
            has = f"with an MLP of width 1 the model has {amount(smallest, self.what)}, more than {wanted}"
        elif nearest is None:
            has = f"no model.{FFN} is one that the run can have"
        else:
            has = f"model.{FFN} {nearest.ffn_width} comes nearest, with {amount(self.cost(nearest), self.what)} for {wanted}"
        return UserError(f"{has}; change model.num_heads, model.head_dim or parallel.tensor, or {self._other_ways(by)}")

    def _no_cache(self, config: ModelConfig, fields: Sequence[str], by: By | None) -> UserError:
        words = []
        for field in fields:
            if not self.depends(config, field):
                words.append(f"the cache of {config.attention_words} does not depend on model.{field}")
            elif (nearest := self.nearest(config, field)) is None:
                words.append(f"no model.{field} is one that the run can have")
            else:
                has = amount(self.cost(nearest), self.what)
                words.append(f"model.{field} {getattr(nearest, field)} comes nearest, with {has}")
        widths = [name for name in ("head_dim", "rope_dim") if getattr(config, name) and self.depends(config, name)]
        change = "".join(f"change model.{name}, or " for name in widths)
        return UserError(f"{', '.join(words)}; wanted: {amount(self.wanted, self.what)}; {change}{self._other_ways(by)}")

    def _other_ways(self, by: By | None) -> str:
        usual: By = "heads" if self.what == "kv_bytes" else "ffn"
        ways = [way for way in WAYS if way != (by or usual) and (way != "ffn" or self.what != "kv_bytes")]
        return f"take --match-by {' or '.join(ways)}"


def _with(config: ModelConfig, field: str, value: int) -> ModelConfig:
    return config.model_copy(update={field: value})


def _fixed(config: ModelConfig) -> ModelConfig:
    """With the width of a head written out, so that it stays as it is when heads are added."""
    return _with(config, "head_dim", config.head_width)


def _largest(config: ModelConfig, field: str) -> int:
    """The largest value of a field."""
    by_schema = int(next(rule.le for rule in ModelConfig.model_fields[field].metadata if hasattr(rule, "le")))
    return min(by_schema, config.num_heads) if field in ("num_seeds", "num_kv_heads") else by_schema


def _steps(config: ModelConfig, field: str) -> tuple[int, ...]:
    """Of what a field's value is a multiple, best first: layers of a pattern that repeats evenly go on doing so."""
    if field == "num_layers":
        repeated = len(config.pattern)
        return (repeated if config.num_layers % repeated == 0 else 1,)
    return MULTIPLES if field in (FFN, "latent_dim") else (1,)


def _shown(config: ModelConfig, field: str) -> object:
    """A field's value, or what its default stands for."""
    return {FFN: config.ffn_width, "head_dim": config.head_width}.get(field, getattr(config, field))

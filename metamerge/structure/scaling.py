"""Which groups allow more than permutations: positive factors (ReLU), signs (tanh), any factor.

Every axis of every value that carries a group gets an unknown *power*: the value is multiplied by
``s^power`` when unit ``i`` of the group is scaled by ``s_i``. Operators tie the powers linearly: a
ReLU passes a positive factor on, a product adds powers, a sum over the units asks that the powers
of both sides cancel, a normalisation asks for power 0. What is left free is a symmetry. Signs obey
the same equations modulo 2, where odd functions pass them on.

Source: the rescaling symmetry of ReLU networks, Neyshabur et al., "Path-SGD", NeurIPS 2015,
arXiv:1506.02617, section 2; sign symmetry of odd activations, Chen, Lu, Hecht-Nielsen, "On the
geometry of feedforward neural network error surfaces", Neural Computation 5(6), 1993.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import lcm

from metamerge.structure.program import Node, Program, Ref
from metamerge.structure.rules.spatial import SPATIAL_RULES
from metamerge.structure.rules.views import VIEW_RULES
from metamerge.structure.spec import PermutationSpec, Scaling

Carried = Mapping[str, Sequence[Sequence[str]]]
"""Value -> for each axis the groups that it carries."""
Variable = tuple[str, int]
"""The power of a value along one axis."""

_CONVOLUTIONS = {op for op in SPATIAL_RULES if op.startswith("conv") and "transpose" not in op}
_ADDITIVE = {"add.Tensor", "sub.Tensor"}
_PASSING = {
    *(op for op in VIEW_RULES if op not in {"glu.default", "pad.default"}),
    *(op for op in SPATIAL_RULES if not op.startswith("conv") and "max" not in op),
    *("mean.dim", "sum.dim_IntList", "neg.default", "dropout.default", "to.dtype"),
    *("index.Tensor", "index_select.default", "gather.default", "embedding.default"),
    *("scatter_add.default", "index_add.default"),
}
_POSITIVE = {
    *(op for op in SPATIAL_RULES if "max" in op),
    *("relu.default", "leaky_relu.default", "abs.default", "amax.default", "amin.default"),
}
_ODD = {
    *("tanh.default", "sin.default", "tan.default", "atan.default", "asin.default"),
    *("sinh.default", "asinh.default", "erf.default", "sign.default"),
}
_EVEN = {"cos.default", "cosh.default", "abs.default", "square.default"}
_TEMPLATES = {
    *("new_zeros.default", "new_ones.default", "new_full.default", "new_empty.default"),
    *("zeros_like.default", "ones_like.default", "full_like.default", "empty_like.default"),
}  # read a tensor for its shape and dtype alone
_PRODUCTS = {"mul.Tensor": 1, "div.Tensor": -1}
_NORMS = {"layer_norm.default", "rms_norm.default", "group_norm.default", "instance_norm.default"}


def find_scalings(program: Program, spec: PermutationSpec, carried: Carried) -> PermutationSpec:
    """Record the changes of scale that a network allows.

    Args:
        program: The traced network.
        spec: Its permutation spec.
        carried: Value -> for each axis the groups that it carries.

    Returns:
        The spec with its scalings, not proved yet.
    """
    scalings: list[Scaling] = []
    for group in spec.groups:
        factors = _solutions(program, carried, group, 0)
        signs = _solutions(program, carried, group, 2)
        known: list[dict[Variable, int]] = []
        for powers in factors:
            parity = {v: p % 2 for v, p in powers.items() if p % 2}
            real = _spanned(parity, signs)
            known += [parity] if real else []
            scalings.append(_scaling(program, group, "real" if real else "positive", powers))
        for parity in signs:
            if not _spanned(parity, known):
                known.append(parity)
                scalings.append(_scaling(program, group, "sign", parity))
    return replace(spec, scalings=tuple(scalings))


def _scaling(program: Program, group: str, kind: str, powers: Mapping[Variable, int]) -> Scaling:
    own: dict[str, dict[int, int]] = {}
    for (value, axis), power in powers.items():
        own.setdefault(program.parameters[value], {})[axis] = power
    own |= {alias: own[key] for alias, key in program.tied.items() if key in own}
    return Scaling(group, kind, own)


@dataclass
class _Equations:
    """Linear equations between powers, over the integers or modulo 2, solved as they come."""

    modulus: int
    solved: dict[Variable, dict[Variable, Fraction]] = field(default_factory=dict)
    order: dict[Variable, int] = field(default_factory=dict)

    def zero(self, *variables: Variable) -> None:
        """Every power is 0."""
        for variable in variables:
            self.add({variable: 1})

    def equal(self, one: Variable, other: Variable) -> None:
        """Two powers are the same."""
        if one != other:
            self.add({one: 1, other: -1})

    def add(self, terms: Mapping[Variable, int]) -> None:
        """A weighted sum of powers is 0."""
        for variable in terms:
            self.order.setdefault(variable, len(self.order))
        left = self.reduced({v: Fraction(c) for v, c in terms.items()})
        if left:
            pivot = max(left, key=self.order.__getitem__)
            scale = left.pop(pivot)
            self.solved[pivot] = {v: self._number(-c / scale) for v, c in left.items()}

    def reduced(self, terms: dict[Variable, Fraction]) -> dict[Variable, Fraction]:
        """A sum in terms of powers that are free."""
        while pending := [v for v in terms if v in self.solved]:
            for variable in pending:
                factor = terms.pop(variable)
                for other, c in self.solved[variable].items():
                    terms[other] = self._number(terms.get(other, Fraction(0)) + factor * c)
            terms = {v: c for v, c in terms.items() if c}
        return {v: reduced for v, c in terms.items() if (reduced := self._number(c))}

    def _number(self, value: Fraction) -> Fraction:
        return Fraction(int(value) % 2) if self.modulus else value


def _solutions(
    program: Program, carried: Carried, group: str, modulus: int
) -> list[dict[Variable, int]]:
    """A basis of the powers of the parameters; empty where only 0 is possible."""
    equations = _Equations(modulus)
    relations = _Relations(equations, carried, group, odd=bool(modulus))
    parameters = [
        (value, axis)
        for value in program.parameters
        for axis, groups in enumerate(carried.get(value, ()))
        if group in groups
    ]
    for variable in parameters:
        equations.order.setdefault(variable, len(equations.order))
    sources = {node.name: node for node in program.nodes}
    for node in program.nodes:
        if any(relations.axes(name) for name in (node.name, *node.refs)):
            relations.relate(node, sources)
    reduced = {v: equations.reduced({v: Fraction(1)}) for v in parameters}
    free = sorted({f for terms in reduced.values() for f in terms}, key=equations.order.__getitem__)
    found = []
    for chosen in free:
        powers = {v: terms[chosen] for v, terms in reduced.items() if chosen in terms}
        scale = lcm(*(p.denominator for p in powers.values()))
        sign = 1 if next(iter(powers.values())) > 0 else -1
        found.append({v: int(p * scale * sign) for v, p in powers.items()})
    return found


@dataclass
class _Relations:
    """The equations of each operator, for one group."""

    equations: _Equations
    carried: Carried
    group: str
    odd: bool

    def axes(self, value: str) -> list[int]:
        """Axes of a value that carry the group."""
        return [d for d, groups in enumerate(self.carried.get(value, ())) if self.group in groups]

    def variables(self, *values: str) -> list[Variable]:
        """The unknown powers of some values."""
        return [(value, axis) for value in values for axis in self.axes(value)]

    def relate(self, node: Node, sources: Mapping[str, Node]) -> None:
        """Add the equations of one operator."""
        op = node.op
        if op == "python.getitem":
            self._take_output(node, sources)
        elif op in _PASSING or (op in _POSITIVE and not self.odd) or (op in _ODD and self.odd):
            self._pass(node, node.refs)
        elif op in _TEMPLATES or (op in _EVEN and self.odd):
            self.equations.zero(*self.variables(node.name))
        elif op == "pad.default" and not node.arguments.get("value"):
            self._pass(node, node.refs)
        elif op == "prelu.default" and not self.odd:
            self.equations.zero(*self.variables(*node.refs[1:]))
            self._pass(node, node.refs[:1])
        elif op in _ADDITIVE or (op in {"maximum.default", "minimum.default"} and not self.odd):
            self._sum(node)
        elif op in _PRODUCTS:
            self._product(node, _PRODUCTS[op])
        elif op == "linear.default" or op in _CONVOLUTIONS:
            self._layer(node)
        elif op in {"matmul.default", "bmm.default"}:
            self._matmul(node, *node.refs[:2])
        elif op in {"addmm.default", "baddbmm.default"}:
            self._matmul(node, *node.refs[1:3])
            self._pass(node, node.refs[:1])
        elif op == "scaled_dot_product_attention.default":
            self._attention(node)
        elif op in _NORMS or op == "batch_norm.default":
            self._norm(node)
        else:
            self.equations.zero(*self.variables(node.name, *node.refs))

    def _pass(self, node: Node, reads: Sequence[str], made: str | None = None) -> None:
        """Units keep their power; where the group is summed over, or seen twice, it is 0."""
        out = self.variables(made or node.name)
        if not out and (made or node.op in VIEW_RULES):
            return  # a piece without these units
        if not any(self.axes(name) for name in reads):  # repeated entries, which are all alike
            self.equations.zero(*out)
        for name in dict.fromkeys(reads):
            own = self.variables(name)
            if len(own) == len(out):
                for one, other in zip(own, out, strict=True):
                    self.equations.equal(one, other)
            else:
                self.equations.zero(*own, *(out if own else ()))

    def _take_output(self, node: Node, sources: Mapping[str, Node]) -> None:
        source = sources[node.args[0].name]
        if source.op in _PASSING:
            self._pass(node, [r for r in source.refs if self.axes(r)], node.name)
        else:
            self.equations.zero(*self.variables(node.name, *source.refs))

    def _sum(self, node: Node) -> None:
        names = [a.name for a in node.args[:2] if isinstance(a, Ref)]
        if len(names) == 2 and all(self.axes(name) for name in names):
            self._aligned(node, names, [1, 1], together=False)
        else:  # a shift that is the same for all units
            self.equations.zero(*self.variables(node.name, *names))

    def _product(self, node: Node, sign: int) -> None:
        names = [a.name for a in node.args[:2] if isinstance(a, Ref)]
        signs = [s for s, a in zip((1, sign), node.args, strict=False) if isinstance(a, Ref)]
        self._aligned(node, names, signs, together=True)

    def _aligned(
        self, node: Node, names: Sequence[str], signs: Sequence[int], *, together: bool
    ) -> None:
        """Entry-wise operators, axes aligned at the last: powers add up, or are all the same."""
        width = len(self.carried[node.name])
        for axis in self.axes(node.name):
            terms: dict[Variable, int] = {(node.name, axis): -1}
            for name, sign in zip(names, signs, strict=True):
                own = axis - width + len(self.carried.get(name, ()))
                if own not in self.axes(name):
                    continue
                if together:
                    terms[name, own] = terms.get((name, own), 0) + sign
                else:
                    self.equations.equal((name, own), (node.name, axis))
            if together:
                self.equations.add(terms)

    def _layer(self, node: Node) -> None:
        """Columns cancel what comes in, rows and bias make what goes out."""
        x, weight, *bias = node.refs
        channel = len(self.carried[x]) - 1 if node.op == "linear.default" else 1
        rows = len(self.carried[node.name]) - 1 if node.op == "linear.default" else 1
        grouped = node.arguments.get("groups", 1) != 1
        if grouped and (self.axes(x) or self.axes(weight)):
            self.equations.zero(*self.variables(node.name, *node.refs))
            return
        self._contract([(x, channel), (weight, 1)])
        for name, axis in ((weight, 0), *((b, 0) for b in bias)):
            self._tie((name, axis), (node.name, rows))
        for axis in self.axes(x):
            if axis != channel:
                self._tie((x, axis), (node.name, axis))
                if bias:  # the same for all positions
                    self.equations.zero((x, axis))

    def _matmul(self, node: Node, one: str, other: str) -> None:
        """``a b``: the last axis of a meets the last but one of b; axes before are a batch."""
        if one == other:
            self.equations.zero(*self.variables(node.name, one))
            return
        a, b, out = (len(self.carried.get(name, ())) for name in (one, other, node.name))
        if min(a, b) < 2:
            self.equations.zero(*self.variables(node.name, one, other))
            return
        self._contract([(one, a - 1), (other, b - 2)])
        self._tie((one, a - 2), (node.name, out - 2))
        self._tie((other, b - 1), (node.name, out - 1))
        self._batch(node.name, [one, other], out - 2)

    def _batch(self, made: str, names: Sequence[str], before: int) -> None:
        """Axes that are a batch: powers add up."""
        width = len(self.carried[made])
        for axis in range(before):
            terms: dict[Variable, int] = {}
            for name in names:
                own = axis - width + len(self.carried[name])
                if own in self.axes(name):
                    terms[name, own] = terms.get((name, own), 0) + 1
            if axis in self.axes(made):
                self.equations.add({**terms, (made, axis): -1})
            else:
                self.equations.zero(*terms)

    def _attention(self, node: Node) -> None:
        """Queries and keys cancel, values pass; the softmax between them allows no power."""
        q, k, v = (node.arguments[name].name for name in ("query", "key", "value"))
        width = len(self.carried[q])
        if len({q, k, v}) < 3 or {len(self.carried[name]) for name in (k, v)} != {width}:
            self.equations.zero(*self.variables(node.name, *node.refs))
            return
        self._contract([(q, width - 1), (k, width - 1)])
        self._tie((v, width - 1), (node.name, width - 1))
        for axis in range(width - 1):
            self._contract([(q, axis), (k, axis)])
            if axis < width - 2:
                self._tie((v, axis), (node.name, axis))
        self.equations.zero(*(x for x in self.variables(q, k, v) if x[1] == width - 2))
        self.equations.zero(*(x for x in self.variables(node.name) if x[1] == width - 2))
        self.equations.zero(*self.variables(*node.refs[3:]))

    def _norm(self, node: Node) -> None:
        """Statistics allow no power; gain and bias give one to what comes out."""
        reads = {n: a.name for n, a in node.arguments.items() if isinstance(a, Ref)}
        affine = [reads.pop(name) for name in ("weight", "bias") if name in reads]
        self.equations.zero(*self.variables(*reads.values()))
        out = self.variables(node.name)
        own = [variable for name in affine for variable in self.variables(name)]
        for variable in out:
            if not own:
                self.equations.zero(variable)
            for other in own:
                self.equations.equal(variable, other)
        if not out:
            self.equations.zero(*own)

    def _contract(self, variables: Sequence[Variable]) -> None:
        """The group is summed over: its powers cancel."""
        there = [v for v in variables if v[1] in self.axes(v[0])]
        if there:
            self.equations.add(dict.fromkeys(there, 1))

    def _tie(self, one: Variable, other: Variable) -> None:
        """Two powers are the same, where both carry the group; else there is none."""
        there = [v for v in (one, other) if v[1] in self.axes(v[0])]
        if len(there) == 2:
            self.equations.equal(*there)
        else:
            self.equations.zero(*there)


def _spanned(vector: Mapping[Variable, int], basis: Sequence[Mapping[Variable, int]]) -> bool:
    """Whether a vector is a sum of some basis vectors, modulo 2."""
    rows: list[set[Variable]] = []
    for one in [*basis, vector]:
        left = {v for v, p in one.items() if p % 2}
        for row in rows:
            if min(row) in left:
                left ^= row
        if left:
            rows = [row ^ left if min(left) in row else row for row in rows]
            rows.append(left)
        if one is vector:
            return not left
    return False

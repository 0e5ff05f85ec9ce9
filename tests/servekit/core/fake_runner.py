"""An execution side without a model: it follows plans to the letter and checks every block that it reads.

The "model" is a pure function of the tokens so far. The cache holds, for each (group, block, offset), the digest of
the tokens up to there; before a token is computed, every position that its layer kind may look at must hold the
digest of this very row. So a wrong table, a block given out too early, a bad copy or a false hit fails at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b

from servekit.core.facts import KVGroup
from servekit.core.plan import NULL_BLOCK, RowStart, StepPlan, StepResult, TokenLogprob

VOCABULARY = 50


def digest(tokens: list[int], salt: str = "") -> bytes:
    return blake2b(repr((tokens, salt)).encode(), digest_size=8).digest()


def next_token(tokens: list[int]) -> int:
    return digest(tokens)[0] % VOCABULARY


def expected_output(prompt: list[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


@dataclass
class FakeRow:
    start: RowStart
    tokens: list[int]
    computed: int
    tables: list[list[int]] = field(default_factory=list)


class FakeRunner:
    def __init__(self, block_size: int, groups: list[KVGroup], propose: int = 0) -> None:
        self.block_size = block_size
        self.groups = groups
        self.propose = propose
        self.rows: dict[int, FakeRow] = {}
        self.memory: dict[tuple[int, int, int], bytes] = {}
        self.fail_slots: dict[str, str] = {}  # request id -> error at its next sample
        self.tier: dict[int, list[bytes | None]] = {}
        self.most_rows = 0
        self.tokens_computed = 0

    def execute(self, plan: StepPlan) -> StepResult:
        for slot in plan.ends:
            del self.rows[slot]
        for block, slot in plan.saves:
            self.tier[slot] = [self.memory.get((0, block, offset)) for offset in range(self.block_size)]
        for slot, block in plan.loads:
            for offset, held in enumerate(self.tier[slot]):
                self.memory[0, block, offset] = held
        for group, source, target in plan.copies:
            for offset in range(self.block_size):
                if (group, source, offset) in self.memory:
                    self.memory[group, target, offset] = self.memory[group, source, offset]
        for start in plan.starts:
            assert start.slot not in self.rows, "a slot was given out twice"
            tables = [list(table) for table in start.blocks]
            self.rows[start.slot] = FakeRow(start, list(start.token_ids), start.num_computed_tokens, tables)
        for append in plan.appends:
            self.rows[append.slot].tables[append.group].extend(append.blocks)
        self.most_rows = max(self.most_rows, len(self.rows))
        return self._compute(plan)

    def _compute(self, plan: StepPlan) -> StepResult:
        tokens, errors, proposals, prompts = [], {}, {}, {}
        assert len(set(plan.slots)) == len(plan.slots)
        for slot, count, samples in zip(plan.slots, plan.num_tokens, plan.samples, strict=True):
            row, drafts = self.rows[slot], plan.drafts.get(slot, [])
            self.tokens_computed += count
            first = row.computed
            row.tokens.extend(drafts)
            assert first + count <= len(row.tokens), "a token was planned that nobody knows"
            for position in range(first, first + count):
                self._compute_token(row, position)
            if row.start.sampling.prompt_logprobs is not None:
                last = min(first + count, row.start.num_prompt_tokens - 1)
                prompts[slot] = [TokenLogprob(row.tokens[p], -1.0, 1) for p in range(first + 1, last + 1)]
            if not samples:
                row.computed = first + count
                continue
            if row.start.request_id in self.fail_slots:
                errors[slot] = self.fail_slots.pop(row.start.request_id)
                tokens.append([])
                continue
            accepted = self._sample(row, drafts)
            tokens.append(accepted)
            row.computed = len(row.tokens) - 1
            if self.propose:
                guess = expected_output(row.tokens, self.propose)
                wrong = digest(row.tokens)[1] % (self.propose + 1)  # a lie somewhere, often
                proposals[slot] = [*guess[:wrong], *((g + 1) % VOCABULARY for g in guess[wrong:])]
        return StepResult(plan.step, tokens, errors=errors, proposals=proposals, prompt_logprobs=prompts)

    def _sample(self, row: FakeRow, drafts: list[int]) -> list[int]:
        base = len(row.tokens) - len(drafts)
        accepted: list[int] = []
        for draft in [*drafts, None]:
            token = next_token(row.tokens[:base] + accepted)
            accepted.append(token)
            if token != draft:
                break
        row.tokens = row.tokens[:base] + accepted
        return accepted

    def _compute_token(self, row: FakeRow, position: int) -> None:
        salt = f"{row.start.adapter_id}"
        for index, group in enumerate(self.groups):
            table = row.tables[index]
            if group.kind == "linear":
                key = (index, table[0], 0)
                if position:
                    assert self.memory[key] == digest(row.tokens[:position], salt), "the state is not this row's"
                self.memory[key] = digest(row.tokens[: position + 1], salt)
                continue
            oldest = max(0, position - group.window + 1) if group.kind == "sliding" else 0
            for seen in range(oldest, position):
                block, offset = table[seen // self.block_size], seen % self.block_size
                assert block != NULL_BLOCK, f"token {position} needs the block of token {seen}, which was given back"
                held = self.memory.get((index, block, offset))
                assert held == digest(row.tokens[: seen + 1], salt), f"token {position}: position {seen} is not its own"
            block = table[position // self.block_size]
            assert block != NULL_BLOCK
            self.memory[index, block, position % self.block_size] = digest(row.tokens[: position + 1], salt)

"""The settings of the core, each checked once."""

from __future__ import annotations

from dataclasses import dataclass

from common_platform.errors import ConfigError

BLOCK_SIZES = (8, 16, 32, 64)
POLICIES = ("fcfs", "priority", "fair")


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Size and sharing of the paged KV cache."""

    num_blocks: int  # of one KV group, the null block included
    block_size: int = 16  # tokens per block
    enable_prefix_caching: bool = True
    num_offload_blocks: int = 0  # evicted blocks that a second tier keeps; models with full attention only

    def __post_init__(self) -> None:
        if self.block_size not in BLOCK_SIZES:
            raise ConfigError("block_size", self.block_size, f"one of {BLOCK_SIZES}", flag="--block-size")
        if self.num_blocks < 2:
            raise ConfigError("num_blocks", self.num_blocks, "2 or more", flag="--kv-cache-memory-bytes")
        if self.num_offload_blocks < 0:
            raise ConfigError("num_offload_blocks", self.num_offload_blocks, "0 or more", flag="--kv-offload-bytes")

    @property
    def usable_blocks(self) -> int:
        return self.num_blocks - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """How much one step does, and for whom."""

    max_num_seqs: int = 64  # rows of the input batch
    max_num_batched_tokens: int = 2048  # tokens a step computes at the most
    max_model_len: int = 2048  # tokens of one sequence, prompt and output
    long_prefill_token_threshold: int = 0  # longest prefill chunk of one request in a step; 0: the whole budget
    enable_chunked_prefill: bool = True  # False: a prompt waits until one step can compute all that is left of it
    policy: str = "fcfs"
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        for name, flag in (
            ("max_num_seqs", "--max-num-seqs"),
            ("max_num_batched_tokens", "--max-num-batched-tokens"),
            ("max_model_len", "--max-model-len"),
        ):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "1 or more", flag=flag)
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(
                "long_prefill_token_threshold",
                self.long_prefill_token_threshold,
                "0 or more",
                flag="--long-prefill-token-threshold",
            )
        if not self.enable_chunked_prefill:
            self._check_whole_prompts()
        if self.policy not in POLICIES:
            raise ConfigError("policy", self.policy, f"one of {POLICIES}", flag="--scheduling-policy")

    def _check_whole_prompts(self) -> None:
        """Raise ConfigError where a prompt could never be computed in one step."""
        budget, longest = self.max_num_batched_tokens, self.max_model_len
        if budget < longest:
            limit = f"max_model_len={longest} or more where prompts are computed whole"
            flag = "--max-num-batched-tokens, --max-model-len or --enable-chunked-prefill"
            raise ConfigError("max_num_batched_tokens", budget, limit, flag=flag)
        if self.long_prefill_token_threshold:
            name, limit = "long_prefill_token_threshold", "0 where prompts are computed whole"
            raise ConfigError(name, self.long_prefill_token_threshold, limit, flag="--enable-chunked-prefill")

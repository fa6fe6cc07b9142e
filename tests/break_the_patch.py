"""Break the patched package and the tools on purpose and see that the tests notice.

Each mutant changes one place of an installed, patched SGLang, or of tools/, in a copy, and runs
the tests that should object. A mutant that survives is a hole in the tests.

    build/env/bin/python -m tests.break_the_patch [--list] [NAME ...]

Exit status: 0 if every mutant was caught, 1 if one survived, 2 on bad usage.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from testbed.release import ROOT, UPSTREAM

COPY = ROOT / "build" / "mutant"

RECORDER = "srt/entrypoints/openai/token_ids.py"
TRACKING = "srt/managers/token_id_tracking.py"
LOGPROBS = "srt/entrypoints/openai/token_id_logprobs.py"
AS_STOCK = "tests/test_served_as_stock.py"
PROPERTIES = "tests/test_token_ids_property.py"
FUZZ = "tests/test_parser_fuzz.py"
END_TO_END = "tests/test_end_to_end.py"
SEND_CHUNK = (
    '            await send({"type": "http.response.body", "body": body, "more_body": True})'
)


@dataclasses.dataclass
class Mutant:
    """A change of `old` to `new` in `file`, and the pytest arguments that must fail.

    The file is one of the package, or one of tools/.

    Attributes:
        lacking: The releases that have no such place.
    """

    clause: str
    file: str
    old: str
    new: str
    tests: list[str]
    lacking: tuple[str, ...] = ()


PROMPT_IDS = "srt/entrypoints/openai/prompt_ids.py"
TEST_PROMPT_IDS = "tests/test_prompt_ids.py"
TOKENS = "srt/entrypoints/openai/serving_tokens.py"
TOKENS_IN_OUT = "tests/test_tokens_in_out.py"
STOP_TOKEN_IDS = "srt/sampling/stop_token_ids.py"
ALL_OR_NOTHING = "srt/weight_sync/all_or_nothing.py"
SNAPSHOT = "srt/weight_sync/snapshot.py"
BROADCAST = "srt/weight_sync/broadcast.py"
TEST_ALL_OR_NOTHING = "tests/test_all_or_nothing.py"
WEIGHT_VERSIONS = "srt/managers/weight_versions.py"
TEST_WEIGHT_VERSIONS = "tests/test_weight_versions.py"
ROUTES = "srt/entrypoints/trainer_routes.py"
TRAINER_ROUTES = "tests/test_trainer_routes.py"
VLLM_METRICS = "srt/entrypoints/vllm_metrics.py"
VLLM_ROUTES = "srt/entrypoints/vllm_routes.py"
WEIGHT_TRANSFER = "srt/entrypoints/weight_transfer.py"
TRAINER_ADAPTERS = "srt/entrypoints/trainer_adapters.py"
TRAINER_UPDATES = "srt/weight_sync/trainer_updates.py"

PREFIX = "srt/entrypoints/openai/prompt_prefix.py"
KEPT_TURNS = "srt/entrypoints/openai/kept_turns.py"
TURNS = "tests/test_turns.py"
AGENT_IDS = "srt/entrypoints/agent_token_ids.py"
AGENTS = "tests/test_agents.py"
RESPONSE_TURNS = "srt/entrypoints/response_turns.py"
GPT_OSS = "tests/test_gpt_oss.py"

ID_NAMES = "srt/entrypoints/openai/id_names.py"
TEST_ID_NAMES = "tests/test_id_names.py"

LOGITS = "srt/sampling/logit_processors.py"
LOGITS_BATCH = "srt/sampling/logit_processor_batch.py"
TEST_LOGITS = "tests/test_logit_processors.py"

PROCESSES = "srt/utils/engine_processes.py"
ENGINE_CALLS = "srt/entrypoints/engine_calls.py"
REFUSALS = "srt/managers/refusals.py"
TEST_ENGINE = "tests/test_engine.py"
ROUTED_EXPERTS = "srt/entrypoints/openai/routed_experts.py"
TEST_EXPERTS = "tests/test_routed_experts.py"

APPLY = "tools/apply.py"
TEST_APPLY = "tests/test_apply.py"
INSTALL = "tools/install.py"
TEST_BUILD = "tests/test_build.py"

MUTANTS: dict[str, Mutant] = {
    "tokenize-again": Mutant(
        "C1",
        RECORDER,
        'data["token_ids"] = choice.state.output_ids[:end]',
        'data["token_ids"] = sorted(choice.state.output_ids[:end])',
        [END_TO_END, "-k", "test_text and default-free"],
    ),
    "last-id-missing": Mutant(
        "C2",
        TRACKING,
        'meta_info.get("completion_tokens", self.num_ready)',
        'meta_info["completion_tokens"] - bool(meta_info["finish_reason"])',
        [PROPERTIES],
    ),
    "sent-twice": Mutant(
        "C3",
        RECORDER,
        "choice.num_sent = end\n        if",
        "choice.num_sent = end - (end - start > 2)\n        if",
        [PROPERTIES],
    ),
    "ids-late": Mutant(
        "C4",
        RECORDER,
        "if start == end:",
        "if start == end or '\"finish_reason\":null' in tail:",
        [PROPERTIES, "-k", "chat"],
    ),
    "chunk-invented": Mutant(
        "C4",
        RECORDER,
        SEND_CHUNK,
        f"{SEND_CHUNK}\n            if b'\"content\":null' in body:\n    {SEND_CHUNK}",
        [PROPERTIES, "-k", "chat"],
    ),
    "reasoning-lost": Mutant(
        "C4",
        RECORDER,
        SEND_CHUNK,
        '            if b\'"reasoning_content":"\' not in body or b\'"content":"\' in body:\n'
        f"    {SEND_CHUNK}",
        [FUZZ],
    ),
    "sent-twice-with-a-call": Mutant(
        "C3",
        RECORDER,
        "choice.num_sent = end\n        if",
        "choice.num_sent = end - ('\"tool_calls\":[' in tail)\n        if",
        [FUZZ],
    ),
    "sent-again-after-retraction": Mutant(
        "C7",
        "srt/managers/schedule_batch.py",
        "        self.retraction_count += 1\n",
        "        self.retraction_count += 1\n        self.send_token_offset = 0\n",
        [END_TO_END, "-k", "test_retraction"],
    ),
    # Survive on releases before v0.5.23, which have neither.
    "bytes-of-the-text": Mutant(
        "C5",
        LOGPROBS,
        "if _token_id_to_bytes is not None:",
        "if False:",
        ["tests/test_stock_identity.py", "-k", "test_asking_adds_to"],
    ),
    "own-names-missing": Mutant(
        "C2",
        RECORDER,
        "if self._has_own_names:",
        "if False:",
        ["tests/test_stock_identity.py", "-k", "test_asking_adds_to"],
    ),
    "log-probabilities-shifted": Mutant(
        "C5",
        RECORDER,
        "output_token_logprobs[start:end]",
        "output_token_logprobs[max(start - 1, 0) : end - bool(start)]",
        [PROPERTIES],
    ),
    "first-alternatives-for-all": Mutant(
        "C5",
        LOGPROBS,
        "alternatives = top_logprobs[i] if",
        "alternatives = top_logprobs[0] if",
        [PROPERTIES, "-k", "chat"],
    ),
    "prompt-before-truncation": Mutant(
        "C6",
        TRACKING,
        "list(sent_ids[:num_prefilled])",
        "list(sent_ids)",
        [END_TO_END, "-k", "truncated_prompt"],
    ),
    "prompt-on-every-choice": Mutant(
        "C6",
        RECORDER,
        "self._prompt_ids_sent = True",
        "pass",
        [PROPERTIES, "-k", "chat"],
    ),
    "incremental-ids-lost": Mutant(
        "C7",
        TRACKING,
        "tokenized_obj.input_ids, state)",
        "tokenized_obj.input_ids, __import__('dataclasses').replace(state, output_ids=[]))",
        [PROPERTIES, "-k", "incremental"],
    ),
    "lists-of-prompts-forgotten": Mutant(
        "C7",
        TRACKING,
        "self.choices.append(choice)",
        "self.choices[:] = [choice]",
        [END_TO_END, "-k", "test_lists_of_prompts and default"],
    ),
    "queued-abort-unanswered": Mutant(
        "C7",
        TRACKING,
        "num_prefilled = meta_info.setdefault(",
        "num_prefilled = (lambda key, _: meta_info[key])(",
        [END_TO_END, "-k", "one_at_a_time"],
    ),
    "null-when-off": Mutant(
        "C8",
        "srt/entrypoints/openai/protocol.py",
        "class ChatCompletionResponseStreamChoice(BaseModel):\n    index: int\n",
        "class ChatCompletionResponseStreamChoice(BaseModel):\n    index: int\n"
        "    token_ids: Optional[List[int]] = None\n",
        ["tests/test_stock_identity.py"],
    ),
    "false-ignored": Mutant(
        "C9",
        RECORDER,
        "with_ids = default if asked is None else asked",
        "with_ids = default or asked",
        [END_TO_END, "-k", "test_server_default and default_on-"],
    ),
    "flag-ignored": Mutant(
        "C9",
        RECORDER,
        "with_ids = default if asked is None else asked",
        "with_ids = asked",
        [END_TO_END, "-k", "test_server_default and default_on-"],
    ),
    "default-refuses-echo": Mutant(
        "C9",
        RECORDER,
        "(asked and not is_native)",
        "not is_native",
        [END_TO_END, "-k", "test_the_default_leaves_echo"],
    ),
    "default-refuses-a-longer-prompt": Mutant(
        "C9",
        RECORDER,
        "            if self._is_asked:",
        "            if True:",
        [AS_STOCK, "-k", "lengthened"],
    ),
    "log-probabilities-not-given-back": Mutant(
        "C9",
        RECORDER,
        "self._request.logprobs = self._logprobs",
        "pass",
        [AS_STOCK, "-k", "lengthened"],
    ),
    "two-errors": Mutant(
        "C10",
        RECORDER,
        " and not self._is_failed",
        "",
        [AS_STOCK, "-k", "mid_stream"],
    ),
    "dumped-with-the-request": Mutant(
        "C12",
        TRACKING,
        "        tracker.track(",
        "        state.obj.tracker = tracker\n        tracker.track(",
        ["tests/test_operation.py"],
    ),
    "tracker-kept-by-tasks": Mutant(
        "C12",
        TRACKING,
        "        trackers.clear()\n",
        "",
        [AS_STOCK, "-k", "garbage"],
    ),
    "lax-boolean": Mutant(
        "C10",
        "srt/entrypoints/openai/protocol.py",
        "return_token_ids: Optional[StrictBool]",
        "return_token_ids: Optional[bool]",
        [END_TO_END, "-k", "test_not_a_boolean"],
        # Its own field is lax.
        lacking=("v0.5.23",),
    ),
    "prompt-not-as-given": Mutant(
        "C6",
        TOKENS,
        "request.input_ids = request.tokens",
        "request.input_ids = request.tokens[1:]",
        [TEST_PROMPT_IDS, "-k", "taken_as_given"],
    ),
    "lax-ids": Mutant(
        "C10",
        PROMPT_IDS,
        "List[StrictInt]",
        "List[int]",
        [TEST_PROMPT_IDS, "-k", "ids_are_integers"],
    ),
    "all-bad-ids-named": Mutant(
        "C10",
        PROMPT_IDS,
        "fail_fast=True",
        "fail_fast=False",
        [TOKENS_IN_OUT, "-k", "first_of_many"],
    ),
    "logprobs-without-bounds": Mutant(
        "C10",
        PROMPT_IDS,
        "0 <= num_logprobs <= vocab_size",
        "True",
        [TEST_PROMPT_IDS, "-k", "bounds_of_counts"],
    ),
    "choices-without-bounds": Mutant(
        "C10",
        PROMPT_IDS,
        "1 <= n <= max_n",
        "1 <= n",
        [TEST_PROMPT_IDS, "-k", "bounds_of_counts"],
    ),
    "chat-counts-not-checked": Mutant(
        "C10",
        PROMPT_IDS,
        "request.n, request.top_logprobs,",
        "None, None,",
        [TEST_PROMPT_IDS, "-k", "survive and choices and below"],
    ),
    "ids-with-media": Mutant(
        "C1",
        PROMPT_IDS,
        'if part.type != "text":',
        "if False:",
        [TEST_PROMPT_IDS, "-k", "media_is_refused"],
    ),
    "media-that-stock-leaves-out": Mutant(
        "C8",
        "srt/entrypoints/openai/serving_chat.py",
        "ignores_media=True",
        "ignores_media=False",
        [TEST_PROMPT_IDS, "-k", "what_stock_reads_stays"],
        lacking=("v0.5.9", "v0.5.10.post1", "v0.5.12.post1"),
    ),
    "generate-before-truncation": Mutant(
        "C6",
        TRACKING,
        "list(sent_ids[:num_prefilled])",
        "list(sent_ids)",
        [TOKENS_IN_OUT, "-k", "prefilled"],
    ),
    "generate-sends-twice": Mutant(
        "C3",
        TOKENS,
        "end = choice.num_sent = choice.num_ready",
        "end = choice.num_ready",
        [TOKENS_IN_OUT, "-k", "those_of_completions"],
    ),
    "generate-logprobs-shifted": Mutant(
        "C5",
        TOKENS,
        "state.output_token_logprobs[position]",
        "state.output_token_logprobs[max(position - 1, 0)]",
        [TOKENS_IN_OUT, "-k", "those_of_completions"],
    ),
    "prompt-logprobs-one-too-many": Mutant(
        "C5",
        TOKENS,
        "_rank(token, top[:num_top]) if token[0]",
        "_rank(token, top[: num_top + 1]) if token[0]",
        [TOKENS_IN_OUT, "-k", "prompt_logprobs_beside_others"],
    ),
    "prompt-logprobs-from-the-cache": Mutant(
        "C5",
        TOKENS,
        "logprob_start_len=-1 if num_prompt_logprobs is None else 0",
        "logprob_start_len=-1",
        [TOKENS_IN_OUT, "-k", "as_prime_rl_asks"],
    ),
    "top-logprobs-cut": Mutant(
        "C5",
        TOKENS,
        "text, own_rank), *others]",
        "text, own_rank), *others[: len(top) - 1]]",
        [TOKENS_IN_OUT, "-k", "top_logprobs_are_not_cut"],
    ),
    "generate-text-twice": Mutant(
        "C3",
        TOKENS,
        "            self._num_sent_chars[index] = len(text)\n",
        "",
        [TOKENS_IN_OUT, "-k", "text_beside_ids and default"],
    ),
    "generate-ignores-stop-token-ids": Mutant(
        "C1",
        STOP_TOKEN_IDS,
        "if token_id in params.stop_token_ids:",
        "if False:",
        [TOKENS_IN_OUT, "-k", "beside_ignore_eos"],
    ),
    "stop-token-ids-of-stock": Mutant(
        "C8",
        STOP_TOKEN_IDS,
        "if not (params.custom_params or {}).get(_KEY):",
        "if not params.stop_token_ids:",
        [TOKENS_IN_OUT, "-k", "beside_ignore_eos"],
    ),
    "interval-of-the-request-alone": Mutant(
        "C1",
        TOKENS,
        "sampling_params.stream_interval, server_args.stream_interval",
        "sampling_params.stream_interval, 1",
        [TOKENS_IN_OUT, "-k", "interval_of_a_request"],
    ),
    "any-replica": Mutant(
        "C1",
        TOKENS,
        "        return rank\n",
        "        return 0\n",
        [TOKENS_IN_OUT, "-k", "data_parallel_rank"],
    ),
    "version-one-token-early": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        "len(req.output_ids_through_stop) +",
        "max(len(req.output_ids_through_stop) - 1, 0) +",
        [TEST_WEIGHT_VERSIONS, "-k", "middle"],
    ),
    "version-of-the-next-weights": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        "if last[0] is None and num_tokens > last[1]:",
        "if False:",
        [TEST_WEIGHT_VERSIONS, "-k", "several"],
    ),
    "versions-twice": Mutant(
        "C3",
        RECORDER,
        "versions is not None and _NO_FINISH_REASON not in tail",
        "versions is not None",
        [TEST_WEIGHT_VERSIONS, "-k", "several"],
    ),
    "version-of-a-chunked-prefill": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        "if scheduler.chunked_req is not None:",
        "if False:",
        [TEST_WEIGHT_VERSIONS, "-k", "chunk"],
    ),
    "version-of-a-waiting-grammar": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        "yield from scheduler.grammar_manager.grammar_queue",
        "yield from ()",
        [TEST_WEIGHT_VERSIONS, "-k", "anywhere and grammar"],
    ),
    "version-of-another-microbatch": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        'for name in ("running_mbs", "mbs", "last_mbs"):',
        "for name in ():",
        [TEST_WEIGHT_VERSIONS, "-k", "anywhere and mbs"],
    ),
    "version-of-a-step-left-behind": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        "num_pending[req.rid] += accept_lens[i] if accept_lens else 1",
        "pass",
        [TEST_WEIGHT_VERSIONS, "-k", "overlap"],
    ),
    "version-beyond-the-stop": Mutant(
        "C2",
        WEIGHT_VERSIONS,
        "end = min(end, num_tokens)\n",
        "pass\n",
        [TEST_WEIGHT_VERSIONS, "-k", "stop_inside"],
    ),
    "version-of-a-last-output": Mutant(
        "C1",
        WEIGHT_VERSIONS,
        "state.weight_versions.settle(version_before)",
        "pass",
        [TEST_WEIGHT_VERSIONS, "-k", "overtaken"],
    ),
    "pause-undone-by-an-update": Mutant(
        "C12",
        ROUTES,
        "self.resumes_after_update = False\n        if obj",
        "if obj",
        [TRAINER_ROUTES, "-k", "pause_during_an_update and keep-False"],
    ),
    "native-pause-undone-by-an-update": Mutant(
        "C12",
        ROUTES,
        "self.manager.pause_generation = self.pause_generation",
        "pass",
        [TRAINER_ROUTES, "-k", "pause_during_an_update and in_place-False"],
    ),
    "native-continuation-waits": Mutant(
        "C12",
        ROUTES,
        "self.manager.continue_generation = self.continue_generation",
        "pass",
        [TRAINER_ROUTES, "-k", "resume_during and continue_generation"],
    ),
    "pauses-until-the-manager-comes-to-it": Mutant(
        "C1",
        TRAINER_UPDATES,
        "if recv_req.resumes:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "ends_its_pause"],
    ),
    "resumed-by-an-update": Mutant(
        "C12",
        ROUTES,
        "obj.resumes = self.resumes_after_update",
        "obj.resumes = True",
        [TRAINER_ROUTES, "-k", "pause_outlasts"],
    ),
    "resumed-in-an-update": Mutant(
        "C12",
        ROUTES,
        "if not self.is_updating:\n            await self.manager_continue",
        "if True:\n            await self.manager_continue",
        [TRAINER_ROUTES, "-k", "resume_during"],
    ),
    "aborted-requests-stay-paused": Mutant(
        "C12",
        ROUTES,
        "self.send_to_scheduler(ContinueGenerationReqInput())",
        "pass",
        [TRAINER_ROUTES, "-k", "pause_during_an_update and wait"],
    ),
    "forms-are-taken": Mutant(
        "C10",
        ROUTES,
        'if not is_empty and media_type != "application/json":',
        "if False:",
        [TRAINER_ROUTES, "-k", "web_page"],
    ),
    "web-pages-send-json": Mutant(
        "C10",
        ROUTES,
        'if "origin" in headers or "sec-fetch-site" in headers:',
        "if False:",
        [TRAINER_ROUTES, "-k", "web_page"],
    ),
    "folders-told": Mutant(
        "C10",
        ROUTES,
        "await _check_folder(folder)",
        "pass",
        [TRAINER_ROUTES, "-k", "errors_do_not"],
    ),
    "half-an-update-kept": Mutant(
        "C1",
        SNAPSHOT,
        "memory.copy_(copies[address])",
        "pass",
        [TRAINER_ROUTES, "-k", "not_loadable"],
    ),
    "replaced-parameters-kept": Mutant(
        "C1",
        SNAPSHOT,
        "            attributes.clear()\n            attributes.update(old)",
        "            pass",
        [TEST_ALL_OR_NOTHING, "-k", "what_fp8_makes"],
    ),
    "other-data-kept": Mutant(
        "C1",
        SNAPSHOT,
        "tensor.data = data",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "other_data"],
    ),
    "cache-not-flushed": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "error = self._first_error(error) or flush_cache()",
        "error = self._first_error(error)\n        flush_cache()",
        [TEST_ALL_OR_NOTHING, "-k", "what_fp8_makes"],
    ),
    "graphs-read-old-memory": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "if moved is None:",
        "if True:",
        [TEST_ALL_OR_NOTHING, "-k", "cuda_graphs"],
    ),
    "adapters-hide-a-bias": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "setattr(parent, name, layer.base_layer)",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "with_adapters"],
    ),
    "adapters-lost": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "setattr(parent, name, layer)",
        "pass",
        [TRAINER_ROUTES, "-k", "adapters"],
    ),
    "draft-keeps-old-weights": Mutant(
        "C1",
        TRAINER_UPDATES,
        "if not (algorithm.is_none() or algorithm.is_ngram()):",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "draft_models"],
    ),
    "other-loaders": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "if load_format not in _LOAD_FORMATS:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "other_loaders"],
    ),
    "converted-parameters-loaded": Mutant(
        "C1",
        ALL_OR_NOTHING,
        'not hasattr(parameter, "weight_loader")',
        "False",
        [TEST_ALL_OR_NOTHING, "-k", "take_no_new_weights"],
    ),
    "converted-scales-loaded": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "(is_ue8m0 and not was_ue8m0)",
        "False",
        [TEST_ALL_OR_NOTHING, "-k", "fp8_in_blocks"],
    ),
    "updates-in-parallel": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "if size > 1:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "servers_where"],
    ),
    "nothing-to-compare-with": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "self._expected = self._expected or read_shapes(*self._start)",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "a_server_that and dummy"],
    ),
    "views-not-aligned": Mutant(
        "C1",
        BROADCAST,
        "if data.storage_offset() % x.dtype.itemsize:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "test_what_is_sent"],
    ),
    "a-bucket-not-sent-in-full": Mutant(
        "C1",
        BROADCAST,
        "FlattenedTensorBucket(small).get_flattened_tensor()",
        "FlattenedTensorBucket(small).get_flattened_tensor().zero_()",
        [TEST_ALL_OR_NOTHING, "-k", "test_what_is_sent"],
    ),
    "a-large-tensor-in-the-place-of-small-ones": Mutant(
        "C1",
        BROADCAST,
        "sorted(announced, key=lambda x: not _is_large(x.num_bytes))",
        "announced",
        [TEST_ALL_OR_NOTHING, "-k", "test_what_is_sent"],
    ),
    "announcements-too-long": Mutant(
        "C1",
        BROADCAST,
        "num_announced > _ANNOUNCEMENT_BYTES",
        "False",
        [TEST_ALL_OR_NOTHING, "-k", "test_what_is_sent"],
    ),
    "the-next-bucket-in-place-of-this-one": Mutant(
        "C1",
        BROADCAST,
        "yield from before.unpack()",
        "yield from (bucket or before).unpack()",
        [TEST_ALL_OR_NOTHING, "-k", "test_what_is_sent"],
    ),
    "requests-while-paused": Mutant(
        "C1",
        VLLM_ROUTES,
        "if self.routes.refuses_requests and",
        "if False and",
        [TRAINER_ROUTES, "-k", "test_pause and abort"],
    ),
    "refused-after-a-resume": Mutant(
        "C1",
        ROUTES,
        "        self.resumes_after_update = True\n        self.refuses_requests = False",
        "        self.resumes_after_update = True",
        [TRAINER_ROUTES, "-k", "test_pause and wait"],
    ),
    "detokenized-by-one-name": Mutant(
        "C11",
        VLLM_ROUTES,
        "skip_special_tokens=False",
        "skip_special_tokens=True",
        [TRAINER_ROUTES, "-k", "text_has_the_name"],
    ),
    "rendered-without-its-parameters": Mutant(
        "C1",
        VLLM_ROUTES,
        '"max_completion_tokens": "max_tokens",',
        "",
        [TRAINER_ROUTES, "-k", "rendered"],
    ),
    "rendered-without-a-grammar": Mutant(
        "C1",
        VLLM_ROUTES,
        "if structured is not None:",
        "if False:",
        [TRAINER_ROUTES, "-k", "rendered"],
    ),
    "an-adapter-replaced-in-place": Mutant(
        "C1",
        TRAINER_ADAPTERS,
        "adapters[name] = _renamed(new, name)",
        "adapters[name] = _renamed(old, name)",
        [TRAINER_ROUTES, "-k", "loaded_again"],
    ),
    "an-adapter-unloaded-under-requests": Mutant(
        "C1",
        TRAINER_ADAPTERS,
        "task = asyncio.create_task(self._retire(spare, old.lora_id))",
        "await self.manager_unload(UnloadLoRAAdapterReqInput(lora_name=spare))\n"
        "        task = asyncio.create_task(asyncio.sleep(0))",
        [TRAINER_ROUTES, "-k", "loaded_again"],
    ),
    "an-update-without-its-version": Mutant(
        "C1",
        WEIGHT_TRANSFER,
        "if body.weight_version is not None:",
        "if False:",
        [TRAINER_ROUTES, "-k", "trainers_for_vllm"],
    ),
    "a-failed-update-goes-on": Mutant(
        "C1",
        WEIGHT_TRANSFER,
        "        except HTTPException:\n            self.has_started = False\n",
        "        except HTTPException:\n",
        [TRAINER_ROUTES, "-k", "trainers_for_vllm"],
    ),
    "an-update-begins-twice": Mutant(
        "C1",
        WEIGHT_TRANSFER,
        "        if self.has_started:",
        "        if False:",
        [TRAINER_ROUTES, "-k", "trainers_for_vllm"],
    ),
    "aiohttp-refused": Mutant(
        "C1",
        ROUTES,
        'media_type in ("", _NO_CONTENT_TYPE)',
        'media_type in ("",)',
        [TRAINER_ROUTES, "-k", "json_may_be_posted"],
    ),
    "a-trainer-joins-in-vain": Mutant(
        "C1",
        TRAINER_UPDATES,
        "if reason is not None:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "a_server_that and dummy"],
    ),
    "weights-not-compared": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "error = self._find_missing(received) or error",
        "pass",
        [TRAINER_ROUTES, "-k", "test_bad_weights and missing"],
    ),
    "ranks-on-their-own": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "return min(found, key=lambda x: TRAINER_IS_GONE not in x, default=None)",
        "return error",
        [TEST_ALL_OR_NOTHING, "-k", "what_is_wrong_on_one or what_fails_on_one"],
    ),
    "a-trainer-gone-for-one-rank": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "min(found, key=lambda x: TRAINER_IS_GONE not in x, default=None)",
        "(found or [None])[0]",
        [TEST_ALL_OR_NOTHING, "-k", "gone_for_one_rank"],
    ),
    "the-rest-not-received": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "for _ in weights if from_trainer else ():",
        "for _ in ():",
        [TEST_ALL_OR_NOTHING, "-k", "as_they_come and loading"],
    ),
    "loaded-when-all-have-come": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "self._receive(trainer),",
        "iter(list(self._receive(trainer))),",
        [TEST_ALL_OR_NOTHING, "-k", "as_they_come and None"],
    ),
    "another-shape-loaded": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "error = error or self._find_mismatch(name, received[name])",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "as_they_come and shape"],
    ),
    "nobody-watches": Mutant(
        "C1",
        BROADCAST,
        "begun.put(broadcast)",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "is_watched"],
    ),
    "a-watch-without-end": Mutant(
        "C1",
        BROADCAST,
        "begun.put(None)",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "what_is_sent_is_received"],
    ),
    "moves-unnoticed": Mutant(
        "C1",
        SNAPSHOT,
        "        if self.is_current():\n            return None",
        "        return None",
        [TEST_ALL_OR_NOTHING, "-k", "cuda_graphs_do_not_read"],
    ),
    "additions-to-empty-attributes-kept": Mutant(
        "C1",
        SNAPSHOT,
        "if id(attributes) in self._dicts:",
        "if not attributes or id(attributes) in self._dicts:",
        [TEST_ALL_OR_NOTHING, "-k", "loading_replaces"],
    ),
    "blocks-without-their-last": Mutant(
        "C1",
        SNAPSHOT,
        "    if block:\n        yield block",
        "    return",
        [TEST_ALL_OR_NOTHING, "-k", "loading_replaces"],
    ),
    "an-old-snapshot-restored": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "if self._snapshot is None or not self._snapshot.is_current():",
        "if self._snapshot is None:",
        [TEST_ALL_OR_NOTHING, "-k", "known_from_the_last"],
    ),
    "a-walk-for-each-update": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "if self._snapshot is None or not self._snapshot.is_current():",
        "if True:",
        [TEST_ALL_OR_NOTHING, "-k", "known_from_the_last and None"],
    ),
    "items-of-lists-kept": Mutant(
        "C1",
        SNAPSHOT,
        "items[:] = old_items",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "loading_replaces and other_attributes"],
    ),
    "another-view-unnoticed": Mutant(
        "C1",
        SNAPSHOT,
        "return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()",
        "return (tensor.data_ptr(),)",
        [TEST_ALL_OR_NOTHING, "-k", "known_from_the_last and other_view"],
    ),
    "an-update-waits-for-memory": Mutant(
        "C1",
        SNAPSHOT,
        "if self._is_awaited.wait(_PAUSE_S):",
        "if self._is_awaited.wait(_PAUSE_S) and False:",
        [TEST_ALL_OR_NOTHING, "-k", "wait_for_memory"],
    ),
    "an-old-backup-restored": Mutant(
        "C1",
        SNAPSHOT,
        "if x.all()}",
        "}",
        [TEST_ALL_OR_NOTHING, "-k", "others_have_changed"],
    ),
    "checksums-of-all-as-one": Mutant(
        "C1",
        SNAPSHOT,
        "is_whole = piece < _MIN_PIECE_BYTES",
        "is_whole = True",
        [TEST_ALL_OR_NOTHING, "-k", "halves_swapped"],
    ),
    "no-backup-after-an-update": Mutant(
        "C1",
        ALL_OR_NOTHING,
        "if snapshot is not None and self._backs_up:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "copied_beforehand"],
    ),
    "a-backup-without-room": Mutant(
        "C1",
        SNAPSHOT,
        "if num_bytes > num_free:",
        "if False:",
        [TEST_ALL_OR_NOTHING, "-k", "host_without_room"],
    ),
    "what-sleeps-read": Mutant(
        "C1",
        TRAINER_UPDATES,
        "if not server_args.enable_memory_saver:",
        "if True:",
        [TEST_ALL_OR_NOTHING, "-k", "may_sleep"],
    ),
    "no-backup-for-a-trainer": Mutant(
        "C1",
        TRAINER_UPDATES,
        "self.updater.back_up()",
        "pass",
        [TEST_ALL_OR_NOTHING, "-k", "may_sleep"],
    ),
    "one-rank-joins": Mutant(
        "C1",
        ROUTES,
        "world_size = body.num_inference_server * num_own_ranks",
        "world_size = body.num_inference_server",
        [TRAINER_ROUTES, "-k", "ranks_of_a_server and False"],
    ),
    "update-without-a-pause": Mutant(
        "C1",
        ROUTES,
        "await self.manager_pause(PauseGenerationReqInput(mode=mode))\n            success",
        "success",
        [TRAINER_ROUTES, "-k", "test_a_folder"],
    ),
    "admin-key-not-asked-for": Mutant(
        "C8",
        ROUTES,
        "auth_level(AuthLevel.ADMIN_OPTIONAL)(endpoint.__func__)",
        "pass",
        [TRAINER_ROUTES, "-k", "key"],
    ),
    "retracted-unnoticed": Mutant(
        "trainer routes",
        VLLM_METRICS,
        "retractions[engine] += sample.value",
        "pass",
        [TRAINER_ROUTES, "-k", "by_the_name_of_vllm"],
    ),
    "load-without-its-cache": Mutant(
        "trainer routes",
        VLLM_METRICS,
        "usage.add_metric(labels, load.token_usage)",
        "usage.add_metric(labels, 0)",
        [TRAINER_ROUTES, "-k", "names_that_vllm"],
    ),
    "one-cache-for-every-salt": Mutant(
        "generate",
        TOKENS,
        "_CACHE_SALT: request.cache_salt or None,",
        "_CACHE_SALT: None,",
        [TOKENS_IN_OUT, "-k", "salts"],
    ),
    "turn-never-ended": Mutant(
        "turns",
        PREFIX,
        "seam.end if is_ended else seam.end - seam.size",
        "seam.end",
        [TURNS, "-k", "every_turn and qwen3"],
    ),
    "turn-ended-twice": Mutant(
        "turns",
        PREFIX,
        "seam.end if is_ended else seam.end - seam.size",
        "seam.end - seam.size",
        [TURNS, "-k", "every_turn and qwen3"],
    ),
    "prefix-unchecked": Mutant(
        "turns",
        PREFIX,
        "if found < 0:",
        "if False:",
        [TURNS, "-k", "something_else"],
    ),
    "turns-of-everybody": Mutant(
        "turns",
        KEPT_TURNS,
        "headers.get(name) for name in _HEADERS",
        "None for name in _HEADERS",
        [TURNS, "-k", "owners"],
    ),
    "turns-of-every-salt": Mutant(
        "turns",
        KEPT_TURNS,
        '    "cache_salt",\n',
        "",
        [TURNS, "-k", "owners"],
    ),
    "tokenized-without-ids": Mutant(
        "turns",
        KEPT_TURNS,
        "copy_token_ids(request.messages, chat_request.messages)",
        "pass",
        [TURNS, "-k", "final_message"],
    ),
    "parts-not-joined": Mutant(
        "turns",
        KEPT_TURNS,
        'if self.message["role"] == message["role"] == "assistant":',
        "if False:",
        [TURNS, "-k", "in_parts"],
    ),
    "lost-arguments": Mutant(
        "turns",
        KEPT_TURNS,
        'arguments = orjson.loads(arguments or "{}")',
        "arguments = orjson.loads(arguments)",
        [AGENTS, "-k", "arguments"],
    ),
    "blank-thoughts": Mutant(
        "turns",
        KEPT_TURNS,
        'before.split("<think>", 1)[-1].strip()',
        'before.partition("<think>")[2].strip() or before.strip()',
        [AGENTS, "-k", "by_an_sdk and inner and Anthropic"],
    ),
    "reply-not-joined": Mutant(
        "turns",
        KEPT_TURNS,
        "self._end.add(message).digest",
        "_digest_message(self._end.digest, message)",
        [TURNS, "-k", "message_of_the_assistant"],
    ),
    "turns-without-bound": Mutant(
        "turns",
        KEPT_TURNS,
        "if len(self._turns) > self._size:",
        "if len(self._turns) > 2 * self._size:",
        [TURNS, "-k", "bounded"],
    ),
    "reasoning-of-another": Mutant(
        "turns",
        KEPT_TURNS,
        "if not reasoning or reasoning == turn.reasoning:",
        "if True:",
        [TURNS, "-k", "tells_turns_apart"],
    ),
    "call-without-ids": Mutant(
        "C4",
        AGENT_IDS,
        "if _TOOL_USE in data:",
        "if False:",
        [AGENTS, "-k", "start_of_a_call"],
    ),
    "ids-again-at-the-end": Mutant(
        "C3",
        AGENT_IDS,
        "            return _insert_behind(_RESPONSE_KEY, self.all_fields(), data)",
        '            fields = {"token_ids": self.all_fields()["token_ids"]}\n'
        "            data = _insert_behind(_RESPONSE_KEY, self.all_fields(), data)\n"
        "            return _insert(fields, data)",
        [AGENTS, "-k", "any_output and responses and cumulative"],
    ),
    "header-ignored": Mutant(
        "C9",
        AGENT_IDS,
        "asked = read_header(raw_request)",
        "pass",
        [AGENTS, "-k", "test_asking"],
    ),
    "header-over-body": Mutant(
        "C9",
        AGENT_IDS,
        "    if asked is None:\n        asked = read_header(raw_request)",
        "    asked = asked if read_header(raw_request) is None else read_header(raw_request)",
        [AGENTS, "-k", "test_asking"],
    ),
    "text-tokenized-again": Mutant(
        "C6",
        AGENT_IDS,
        "result.prompt = result.prompt_ids",
        "pass",
        [AGENTS, "-k", "multimodal"],
    ),
    "harmony-drops-thoughts": Mutant(
        "turns",
        RESPONSE_TURNS,
        "return ids + render_for_completion(messages[len(messages) - num_left :])",
        "return render_for_completion(messages)",
        [GPT_OSS, "-k", "any_turn"],
    ),
    "harmony-of-all-items": Mutant(
        "turns",
        RESPONSE_TURNS,
        "messages[len(messages) - num_left :]",
        "messages[2:]",
        [GPT_OSS, "-k", "any_turn"],
    ),
    "harmony-not-ended": Mutant(
        "turns",
        RESPONSE_TURNS,
        "if ids[-1] not in encoding.stop_tokens():",
        "if False:",
        [GPT_OSS, "-k", "any_turn"],
    ),
    "harmony-of-every-head": Mutant(
        "turns",
        RESPONSE_TURNS,
        "_describe(messages[:_NUM_HEAD])",
        "None",
        [GPT_OSS, "-k", "another_head"],
    ),
    "harmony-of-a-day": Mutant(
        "turns",
        RESPONSE_TURNS,
        "            part.pop(_DATE, None)\n",
        "            pass\n",
        [GPT_OSS, "-k", "midnight"],
    ),
    "response-without-a-name": Mutant(
        "turns",
        AGENT_IDS,
        'keep_reply(to_message(output), response["id"])',
        "keep_reply(to_message(output))",
        [GPT_OSS, "-k", "any_turn and previous"],
    ),
    "names-without-bound": Mutant(
        "turns",
        KEPT_TURNS,
        "for key in turn.keys:\n            self._by_key[key].remove(number)",
        "for key in (turn.digests[-1],):\n            self._by_key[key].remove(number)",
        [GPT_OSS, "-k", "last_turns"],
    ),
    "shown-by-a-stream-ignored": Mutant(
        "turns",
        AGENT_IDS,
        'self._shown.append(orjson.loads("{" + data)["item"])',
        "self._shown.append({})",
        [GPT_OSS, "-k", "any_turn and items"],
    ),
    "generations-of-one": Mutant(
        "C6",
        AGENT_IDS,
        'fields["generations"] = generations',
        "pass",
        [GPT_OSS, "-k", "generations"],
    ),
    "sglext-after-usage": Mutant(
        "names",
        ID_NAMES,
        "(_NO_CHOICES in chunk or chunk == _DONE)",
        "chunk == _DONE",
        [TEST_ID_NAMES, "-k", "sglext_of_a_stream"],
    ),
    "sglext-alone": Mutant(
        "names",
        ID_NAMES,
        "elif _SGLEXT_KEY not in chunk:",
        "else:",
        [TEST_ID_NAMES, "-k", "what_else"],
    ),
    "sglext-of-the-last-part": Mutant(
        "names",
        ID_NAMES,
        "choice.state.output_ids[: choice.num_ready]",
        "choice.state.output_ids[choice.num_ready // 2 : choice.num_ready]",
        [TEST_ID_NAMES, "-k", "abort"],
    ),
    "sglext-unframed": Mutant(
        "names",
        ID_NAMES,
        'headers.get(_FRAMED_HEADER) == "1"',
        "False",
        [TEST_ID_NAMES, "-k", "framed"],
    ),
    "meta-info-of-a-part": Mutant(
        "names",
        ID_NAMES,
        "            if name in meta_info:",
        "            if False:",
        [TEST_ID_NAMES, "-k", "meta_info"],
    ),
    "prompt-on-every-chunk": Mutant(
        "names",
        ID_NAMES,
        "started.add(index)",
        "pass",
        [TEST_ID_NAMES, "-k", "meta_info"],
    ),
    "versions-with-ids-alone": Mutant(
        "names",
        RECORDER,
        "with_ids if with_versions is None else with_versions",
        "with_ids and with_versions is not False",
        [TEST_ID_NAMES, "-k", "weight_versions"],
    ),
    "versions-with-ids-always": Mutant(
        "names",
        RECORDER,
        "with_ids if with_versions is None else with_versions",
        "with_ids or with_versions",
        [TEST_ID_NAMES, "-k", "weight_versions"],
    ),
    "most-likely-tokens-as-text": Mutant(
        "names",
        LOGPROBS,
        "and [self._name_tokens(alternatives) for alternatives in top_logprobs]",
        "and [alternatives for alternatives in top_logprobs]",
        [TEST_ID_NAMES, "-k", "as_token_ids"],
    ),
    "applied-anywhere": Mutant(
        "tools",
        APPLY,
        "if len(places) > 1:",
        "if False:",
        [TEST_APPLY, "-k", "not_the_only_one"],
    ),
    "applied-in-part": Mutant(
        "tools",
        APPLY,
        "for path in reversed(done):",
        "for path in ():",
        [TEST_APPLY, "-k", "full"],
    ),
    "applied-to-the-cache": Mutant(
        "tools",
        APPLY,
        "unfinished.replace(path)",
        "path.write_bytes(content)",
        [TEST_APPLY, "-k", "linked"],
    ),
    "applied-without-a-version": Mutant(
        "tools",
        APPLY,
        "set_version(scratch / version, release)",
        "pass",
        [TEST_APPLY, "-k", "files_of_the_wheel"],
    ),
    "another-change-unnamed": Mutant(
        "tools",
        APPLY,
        "{difference}{author_of(tree, file, line)}",
        "{difference}",
        [TEST_APPLY, "-k", "conflict"],
    ),
    "release-guessed": Mutant(
        "tools",
        APPLY,
        'if found and "dev" not in found[1]:',
        "if found:",
        [TEST_APPLY, "-k", "guessed"],
    ),
    "taken-off-over-changes": Mutant(
        "tools",
        APPLY,
        "if result.returncode != 0:",
        "if False:",
        [TEST_APPLY, "-k", "changed_again"],
    ),
    "undo-unquoted": Mutant(
        "tools",
        APPLY,
        "undo: make unapply TREE={shlex.quote(str(root))}",
        "undo: make unapply TREE={root}",
        [TEST_APPLY, "-k", "undoes_it"],
    ),
    "install-of-another-release": Mutant(
        "tools",
        INSTALL,
        'if installed.version.partition("+")[0] != release.version:',
        "if False:",
        [TEST_BUILD, "-k", "install_refuses"],
    ),
    "install-over-changes": Mutant(
        "tools",
        INSTALL,
        "if installed.changed:",
        "if False:",
        [TEST_BUILD, "-k", "install_refuses"],
    ),
    "install-loses-patches": Mutant(
        "tools",
        INSTALL,
        "if not same:",
        "if False:",
        [TEST_BUILD, "-k", "only_a_clean_tree"],
    ),
    "uninstall-of-stock": Mutant(
        "tools",
        INSTALL,
        'if not local.startswith("tokenids."):',
        "if False:",
        [TEST_BUILD, "-k", "replaces_stock"],
    ),
    "mask-of-a-neighbour": Mutant(
        "masks",
        LOGITS_BATCH,
        "rows[state.mask_rows]",
        "rows[state.mask_rows.roll(1)]",
        [TEST_LOGITS, "-k", "batches_change"],
    ),
    "mask-that-made-room": Mutant(
        "masks",
        LOGITS_BATCH,
        "self.version += 1",
        "pass",
        [TEST_LOGITS, "-k", "batches_change"],
    ),
    "masks-kept-for-ever": Mutant(
        "masks",
        LOGITS_BATCH,
        "if num_used > MAX_MASKS:",
        "if False:",
        [TEST_LOGITS, "-k", "kept_for_ever"],
    ),
    "merged-batch-shifted": Mutant(
        "masks",
        LOGITS_BATCH,
        "sizes = (len(info) - len(other), len(other))",
        "sizes = (len(info), len(other))",
        [TEST_LOGITS, "-k", "batches_change"],
    ),
    "temperature-a-token-late": Mutant(
        "masks",
        LOGITS_BATCH,
        "(positions - state.prompt_lens + 1)",
        "(positions - state.prompt_lens)",
        [TEST_LOGITS, "-k", "batches_change"],
    ),
    "temperature-of-the-request-changed": Mutant(
        "masks",
        LOGITS_BATCH,
        "temperatures = info.temperatures * factor.unsqueeze(-1)",
        "temperatures = info.temperatures.mul_(factor.unsqueeze(-1))",
        [TEST_LOGITS, "-k", "batches_change"],
    ),
    "last-mask-of-a-chain": Mutant(
        "masks",
        LOGITS,
        "ids if allowed is None else allowed & ids",
        "ids",
        [TEST_LOGITS, "-k", "choices_and_prompts and processors"],
    ),
    "no-token-left-unnoticed": Mutant(
        "masks",
        LOGITS_BATCH,
        "if num_chunks <= 0 and not",
        "if num_chunks < 0 and not",
        [TEST_LOGITS, "-k", "fails_alone and processors"],
    ),
    "all-of-a-processor-fail": Mutant(
        "masks",
        LOGITS_BATCH,
        "self._call(logits, name, [index], step)",
        "raise",
        [TEST_LOGITS, "-k", "fails_alone and processors"],
    ),
    "pickle-refused-late": Mutant(
        "masks",
        LOGITS,
        "if is_pickled(prepared) and not",
        "if False and not",
        [TEST_LOGITS, "-k", "no_pickle and generate-processors"],
    ),
    "registered-by-packages-ignored": Mutant(
        "masks",
        LOGITS,
        "for source in (*sources, *(",
        "for source in (*(",
        [TEST_LOGITS, "-k", "packages_register"],
    ),
    "several-choices-of-one-room": Mutant(
        "C1",
        TOKENS,
        "elif sampling_params.n > 1:",
        "elif False:",
        [TOKENS_IN_OUT, "-k", "kv_transfer"],
    ),
    "deltas-without-a-stream": Mutant(
        "C9",
        TOKENS,
        "sampling_params.output_kind == 1 and not request.stream",
        "False",
        [TOKENS_IN_OUT, "-k", "deltas_need"],
    ),
    "experts-from-the-start-of-the-prompt": Mutant(
        "routed experts",
        ROUTED_EXPERTS,
        "self._start = start",
        "self._start = 0",
        [TEST_EXPERTS, "-k", "rows_start"],
    ),
    "experts-not-of-a-request": Mutant(
        "routed experts",
        ROUTED_EXPERTS,
        "adapted_request.return_routed_experts = True",
        "pass",
        [TEST_EXPERTS, "-k", "rows_start"],
    ),
    "experts-of-a-wide-type": Mutant(
        "routed experts",
        ROUTED_EXPERTS,
        "max(known) <= 256",
        "max(known) <= 8",
        [TEST_EXPERTS, "-k", "type_is"],
    ),
    "processes-end-with-a-thread": Mutant(
        "engine",
        PROCESSES,
        "engine.start(self, super().start)",
        "super().start()",
        [TEST_ENGINE, "-k", "anywhere and threads and not overlap"],
    ),
    "death-told-to-no-call": Mutant(
        "engine",
        ENGINE_CALLS,
        "for future in waiting:",
        "for future in waiting[:0]:",
        [TEST_ENGINE, "-k", "dead_scheduler"],
    ),
    "dead-engine-takes-calls": Mutant(
        "engine",
        PROCESSES,
        "if self.failure is not None:\n            raise",
        "if False:\n            raise",
        [TEST_ENGINE, "-k", "later_calls"],
    ),
    "reason-of-a-failure-lost": Mutant(
        "engine",
        PROCESSES,
        "_reasons.send_bytes(",
        "bytes(",
        [TEST_ENGINE, "-k", "says_why"],
    ),
    "failed-start-leaves-processes": Mutant(
        "engine",
        PROCESSES,
        "            processes.end()\n            atexit",
        "            atexit",
        [TEST_ENGINE, "-k", "failed_start_leaves"],
    ),
    "failed-start-leaves-sockets": Mutant(
        "engine",
        PROCESSES,
        "            _close_sockets_of_parts(error)\n",
        "",
        [TEST_ENGINE, "-k", "failed_start"],
    ),
    "shutdown-of-all-children": Mutant(
        "engine",
        PROCESSES,
        "tree: List[psutil.Process] = []",
        "tree: List[psutil.Process] = psutil.Process().children()",
        [TEST_ENGINE, "-k", "another_engine_follows"],
    ),
    "manager-not-handed-over": Mutant(
        "engine",
        ENGINE_CALLS,
        "elif inspect.iscoroutinefunction(function):",
        "elif False:",
        [TEST_ENGINE, "-k", "manager_can_be_awaited and not overlap"],
    ),
    "streams-not-handed-over": Mutant(
        "engine",
        ENGINE_CALLS,
        "if inspect.isasyncgenfunction(function):",
        "if False:",
        [TEST_ENGINE, "-k", "anywhere and loop and not overlap"],
    ),
    "chunks-grow-in-the-hands-of-a-caller": Mutant(
        "engine",
        ENGINE_CALLS,
        "copied[name] = _as_of_now(value)",
        "pass",
        [TEST_ENGINE, "-k", "anywhere and stream and not overlap"],
    ),
    "who-is-behind-gets-no-more": Mutant(
        "engine",
        ENGINE_CALLS,
        "if room is not None:",
        "if False:",
        [TEST_ENGINE, "-k", "anywhere and slowly and not overlap"],
    ),
    "only-one-caller-of-a-loop-is-woken": Mutant(
        "engine",
        ENGINE_CALLS,
        "_call_soon(caller, _arrive, crossings)",
        "_call_soon(caller, _arrive, crossings[:1])",
        [TEST_ENGINE, "-k", "anywhere and streams and not overlap"],
    ),
    "ids-outside-of-the-vocabulary": Mutant(
        "engine",
        REFUSALS,
        '_check_ids("input_ids", input_ids, vocab_size)',
        "pass",
        [TEST_ENGINE, "-k", "refused and large and not overlap"],
    ),
    "release-right-after-an-answer": Mutant(
        "engine",
        REFUSALS,
        "if steps < _MAX_STEPS and",
        "if False and",
        [TEST_ENGINE, "-k", "memory and overlap"],
    ),
    "retracted-requests-count": Mutant(
        "engine",
        REFUSALS,
        "scheduler.waiting_queue, grammar_manager.grammar_queue = [], []",
        "pass",
        [TEST_ENGINE, "-k", "memory"],
    ),
    "memory-woken-twice": Mutant(
        "engine",
        REFUSALS,
        "if not asleep:",
        "if False:",
        [TEST_ENGINE, "-k", "refused and waking"],
    ),
    "tensors-not-compared": Mutant(
        "engine",
        REFUSALS,
        "            _check_shape(name, tensor, runner)\n",
        "            pass\n",
        [TEST_ENGINE, "-k", "whole_or_not and shape"],
    ),
    "tensors-left-half-loaded": Mutant(
        "engine",
        REFUSALS,
        "            undo.restore()\n",
        "",
        [TEST_ENGINE, "-k", "whole_or_not and type"],
    ),
    "update-without-a-flush-unsaid": Mutant(
        "engine",
        REFUSALS,
        "keeps_cache = recv_req.flush_cache and not _is_idle(scheduler)",
        "keeps_cache = False",
        [TEST_ENGINE, "-k", "updates_while"],
    ),
    "turns-without-hidden-states": Mutant(
        "engine",
        "srt/managers/session_controller.py",
        "return_hidden_states=req.return_hidden_states,",
        "",
        [TEST_ENGINE, "-k", "sessions"],
        lacking=("v0.5.12.post1", "v0.5.15.post1", "v0.5.16", "v0.5.23"),
    ),
}


def package() -> Path:
    """The folder of the installed package."""
    spec = find_spec("sglang")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def break_project(mutant: Mutant) -> None:
    """Make a copy of the project with the mutant's change.

    Raises:
        ValueError: If the change does not fit.
    """
    ignored = shutil.ignore_patterns(".git", "build", "dist", "third_party", "__pycache__")
    shutil.copytree(ROOT, COPY, ignore=ignored)
    for name in ("build", "dist"):
        (COPY / name).symlink_to(ROOT / name)
    change(mutant, COPY / mutant.file)


def break_package(mutant: Mutant) -> None:
    """Make a copy of the installed package with the mutant's change.

    Raises:
        ValueError: If the change does not fit.
    """
    shutil.copytree(
        package(),
        COPY / "sglang",
        copy_function=os.symlink,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    change(mutant, COPY / "sglang" / mutant.file)


def change(mutant: Mutant, path: Path) -> None:
    text = path.read_text()
    if mutant.old not in text:
        raise ValueError(f"{mutant.file} has no {mutant.old!r}")
    path.unlink()
    path.write_text(text.replace(mutant.old, mutant.new))


def is_caught(mutant: Mutant) -> bool:
    """Make the mutant, run its tests and return whether any failed.

    Raises:
        ValueError: If the change does not fit.
        RuntimeError: If pytest ran no test.
    """
    shutil.rmtree(COPY, ignore_errors=True)
    is_tool = mutant.file.startswith("tools/")
    (break_project if is_tool else break_package)(mutant)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", *mutant.tests],
        cwd=COPY if is_tool else ROOT,
        env=os.environ if is_tool else {**os.environ, "PYTHONPATH": str(COPY)},
        capture_output=True,
        text=True,
    )
    if result.returncode not in (0, 1):
        raise RuntimeError(result.stdout[-2000:] + result.stderr[-2000:])
    return result.returncode == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="mutants (default: all)")
    parser.add_argument("--list", action="store_true", help="list the mutants and exit")
    args = parser.parse_args()
    unknown = [name for name in args.names if name not in MUTANTS]
    if unknown:
        parser.error(f"unknown mutant {unknown[0]!r}; known: {', '.join(MUTANTS)}")
    if args.list:
        for name, mutant in MUTANTS.items():
            print(f"{mutant.clause:5} {name:28} {mutant.file}")
        return 0

    survivors = 0
    for name in args.names or MUTANTS:
        mutant = MUTANTS[name]
        if UPSTREAM in mutant.lacking:
            print(f"{'left out':9} {mutant.clause:5} {name:28} {UPSTREAM} has no such place")
            continue
        start = time.monotonic()
        caught = is_caught(mutant)
        survivors += not caught
        verdict = "caught" if caught else "SURVIVED"
        seconds = time.monotonic() - start
        print(f"{verdict:9} {mutant.clause:5} {name:28} {seconds:5.0f} s", flush=True)
    shutil.rmtree(COPY, ignore_errors=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())

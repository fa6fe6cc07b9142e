"""The OpenAI serving layer over an engine that follows a script, for unit tests."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from types import SimpleNamespace
from typing import Any, AsyncIterator, Dict, List, Sequence
from unittest.mock import Mock, patch

from sglang.srt.entrypoints.openai.protocol import (
    ChatCompletionRequest,
    MessageProcessingResult,
)
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.runtime_context import (
    get_context,
    publish,
    reset_context,
    restore_context,
    snapshot_context,
)
from sglang.srt.server_args import ServerArgs
from sglang.test.test_utils import CustomTestCase

PROMPT_IDS = [1, 2, 3]


@dataclasses.dataclass
class Step:
    """What one step of the engine adds to a choice."""

    ids: List[int]
    text: str
    meta_info: Dict[str, Any] = dataclasses.field(default_factory=dict)


class ScriptedTokenizerManager:
    """Puts out the steps of each choice, in turns."""

    def __init__(self, incremental: bool, **config: Any):
        self.incremental = incremental
        self.config = config
        self.choices: Sequence[Sequence[Step]] = ()
        self.finish_reason: Dict[str, Any] = {"type": "stop", "matched": 2}
        self.server_args = Mock(**config)
        self.served_model_name = "model"
        self.request_logger = Mock(log_requests=False)
        self.model_config = Mock(
            is_multimodal=False,
            vocab_size=1000,
            context_len=1000,
            hf_config=Mock(model_type="llama", architectures=["LlamaForCausalLM"]),
        )
        self.model_config.get_default_sampling_params.return_value = {}
        self.tokenizer = Mock(chat_template=None, bos_token_id=1)
        self.tokenizer.encode.return_value = PROMPT_IDS
        self.create_abort_task = Mock(return_value=None)

    def config_value(self, name: str) -> Any:
        return self.config.get(name)

    async def generate_request(self, obj: Any, request: Any) -> AsyncIterator[Any]:
        states = [
            SimpleNamespace(
                text="",
                output_ids=[],
                output_token_logprobs=[],
                output_top_logprobs=[],
            )
            for _ in self.choices
        ]
        outputs: List[Dict[str, Any]] = [{} for _ in self.choices]
        for turn in range(max(len(steps) for steps in self.choices)):
            for index, steps in enumerate(self.choices):
                if turn < len(steps):
                    is_last = turn == len(steps) - 1
                    outputs[index] = self._take_step(
                        obj, index, states[index], steps[turn], is_last
                    )
                    if obj.stream:
                        yield outputs[index]
        if not obj.stream:
            yield outputs if len(outputs) > 1 else outputs[0]

    def _take_step(
        self, obj: Any, index: int, state: Any, step: Step, is_last: bool
    ) -> Dict[str, Any]:
        start = len(state.output_ids) if self.incremental and obj.stream else 0
        state.text += step.text
        state.output_ids.extend(step.ids)
        meta_info = {
            "id": f"rid-{index}",
            "prompt_tokens": len(PROMPT_IDS),
            "completion_tokens": len(state.output_ids),
            "cached_tokens": 0,
            "weight_version": "default",
            "finish_reason": self.finish_reason if is_last else None,
            **step.meta_info,
        }
        if obj.return_logprob:
            for i in step.ids:
                state.output_token_logprobs.append((-float(i), i, str(i)))
                state.output_top_logprobs.append(
                    [(-float(i), i, str(i)), (-i - 0.5, i + 1, str(i + 1))]
                )
            meta_info["output_token_logprobs"] = state.output_token_logprobs[start:]
            meta_info["output_top_logprobs"] = state.output_top_logprobs[start:]
            meta_info["output_token_logprobs_length"] = len(state.output_ids)
        return {
            "text": step.text if self.incremental and obj.stream else state.text,
            "output_ids": state.output_ids[start:],
            "prompt_token_ids": PROMPT_IDS,
            "meta_info": meta_info,
            "index": index,
        }


class ScriptedServingTestCase(CustomTestCase):
    """Sends requests to the handlers of /v1/chat/completions and /v1/completions."""

    def setUp(self):
        self.addCleanup(restore_context, snapshot_context())

    def ask(
        self,
        request_class: Any,
        choices: Sequence[Sequence[Step]],
        incremental: bool = False,
        config: Dict[str, Any] = {},
        **fields: Any,
    ) -> List[Dict[str, Any]]:
        """Return the chunks of a stream, or a whole response as the only one."""
        reset_context()
        publish(ServerArgs(model_path="dummy"), role="tokenizer")
        get_context().override(
            "test", incremental_streaming_output=incremental, **config
        )
        manager = ScriptedTokenizerManager(incremental, **config)
        manager.choices = choices
        fields = {"model": "model", "n": len(choices), "max_tokens": 100, **fields}
        if request_class is ChatCompletionRequest:
            fields = {"messages": [{"role": "user", "content": "Hi"}], **fields}
            handler = OpenAIServingChat(manager, Mock(chat_template_name=None))
        else:
            fields = {"prompt": PROMPT_IDS, **fields}
            handler = OpenAIServingCompletion(
                manager, Mock(completion_template_name=None)
            )
        return asyncio.run(self._handle(handler, request_class(**fields)))

    async def _handle(self, handler: Any, request: Any) -> List[Dict[str, Any]]:
        messages = MessageProcessingResult("", PROMPT_IDS, None, None, [], [], None)
        with patch.object(
            OpenAIServingChat, "_process_messages", return_value=messages
        ):
            response = await handler.handle_request(request, None)
        if not request.stream:
            is_response = hasattr(response, "body")
            body = response.body if is_response else response.model_dump_json()
            return [json.loads(body)]
        body = bytearray()

        async def send(message):
            body.extend(message.get("body", b""))

        await response.stream_response(send)
        events = body.decode().strip().split("\n\n")
        self.assertEqual(events[-1], "data: [DONE]")
        return [json.loads(event[len("data: ") :]) for event in events[:-1]]


def choices_of(chunks: List[Dict[str, Any]], index: int = 0) -> List[Dict[str, Any]]:
    """Return what the chunks say of one choice."""
    return [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]

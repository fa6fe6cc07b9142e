"""The real serving layer of any release, for tests and benchmarks that play the engine."""

from __future__ import annotations

from typing import Any, NamedTuple

from testbed.release import NUMBER
from testbed.tiny_model import tiny_model_path

# A tokenizer manager that is collected waits for its sockets, and for ever.
KEPT: list[Any] = []


class Handlers(NamedTuple):
    """A tokenizer manager and the handlers over it, in the current event loop."""

    manager: Any
    chat: Any
    completions: Any
    templates: Any

    def with_parsers(self, tool_call_parser: str | None, reasoning_parser: str | None) -> Handlers:
        """Make the chat handler anew, as a server with these parsers has it.

        It derives more from them than their names, and the tokenizer manager nothing.
        """
        parsers = {"tool_call_parser": tool_call_parser, "reasoning_parser": reasoning_parser}
        if NUMBER < (0, 5, 23):
            for name, value in parsers.items():
                setattr(self.manager.server_args, name, value)
        else:
            self.manager.record_config_updates("tests", **parsers)
        return self._replace(chat=type(self.chat)(self.manager, self.templates))


def make_handlers(*flags: str) -> Handlers:
    """Make the handlers of a server with these flags, and no scheduler behind them."""
    from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
    from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.server_args import PortArgs, prepare_server_args

    if NUMBER < (0, 5, 16):
        from sglang.srt.managers.template_manager import TemplateManager
    else:
        from sglang.srt.parser.template_manager import TemplateManager

    path = str(tiny_model_path())
    own = [f"--model-path={path}", "--device=cpu", "--attention-backend=torch_native"]
    server_args = prepare_server_args([*own, *flags])
    if NUMBER >= (0, 5, 23):
        from sglang.srt.runtime_context import publish

        publish(server_args, role="tokenizer")
    manager = TokenizerManager(server_args, PortArgs.init_new(server_args))
    KEPT.append(manager)
    templates = TemplateManager()
    templates.initialize_templates(manager, path)
    return Handlers(
        manager,
        OpenAIServingChat(manager, templates),
        OpenAIServingCompletion(manager, templates),
        templates,
    )

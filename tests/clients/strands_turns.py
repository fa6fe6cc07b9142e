"""An agent of `strands-agents` with the model of `strands-sglang`, which samples from /generate.

    python strands_turns.py URL TOKENIZER NUM_CALLS

The model calls a tool; the agent runs it and ends with call NUM_CALLS. Prints the rollout.
"""

from __future__ import annotations

import json
import sys

from strands import Agent, ToolContext, tool
from strands_sglang import SGLangClient, SGLangModel
from transformers import AutoTokenizer


def main() -> None:
    url, tokenizer, num_calls = sys.argv[1:]
    commands: list[str] = []

    @tool(context=True)
    def bash(command: str, tool_context: ToolContext) -> str:
        """Run a command."""
        commands.append(command)
        if len(commands) == int(num_calls):
            tool_context.invocation_state["request_state"]["stop_event_loop"] = True
        return "naïve ☁"

    model = SGLangModel(
        client=SGLangClient(url, max_retries=0),
        tokenizer=AutoTokenizer.from_pretrained(tokenizer),
        sampling_params={"temperature": 1.0, "max_new_tokens": 64},
    )
    Agent(model=model, tools=[bash], callback_handler=None)("Look at it.")
    print(json.dumps({"commands": commands, **model.rollout.model_dump()}))


if __name__ == "__main__":
    main()

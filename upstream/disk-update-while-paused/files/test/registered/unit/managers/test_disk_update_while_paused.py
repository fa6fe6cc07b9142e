"""Updates of the weights from disk that come while generation is paused.

python test/registered/unit/managers/test_disk_update_while_paused.py
"""

import asyncio
import unittest
from unittest.mock import Mock

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.managers.io_struct import (
    UpdateWeightFromDiskReqInput,
    UpdateWeightFromDiskReqOutput,
)
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.utils.aio_rwlock import RWLock

register_cpu_ci(est_time=10, suite="base-a-test-cpu")


def make_manager(is_paused: bool) -> TokenizerManager:
    manager = TokenizerManager.__new__(TokenizerManager)
    manager.auto_create_handle_loop = Mock()
    manager.mm_processor = None
    manager.elastic_worker_count = 1
    manager.model_update_lock = RWLock()
    manager.is_pause = is_paused
    manager.is_pause_cond = asyncio.Condition()
    manager._update_model_path_info = Mock()
    manager.dispatched = []
    manager._dispatch_to_scheduler = manager.dispatched.append
    return manager


def answer(manager: TokenizerManager, number: int) -> None:
    """Answer an update as the scheduler does, with the path as the message."""
    path = manager.dispatched[number].model_path
    manager._handle_update_weights_from_disk_req_output(
        UpdateWeightFromDiskReqOutput(success=True, message=path)
    )


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


class TestDiskUpdateWhilePaused(CustomTestCase):
    def update(self, manager, path):
        obj = UpdateWeightFromDiskReqInput(model_path=path, load_format="auto")
        return asyncio.create_task(manager.update_weights_from_disk(obj))

    async def run_two(self, is_paused):
        manager = make_manager(is_paused)
        tasks = [self.update(manager, path) for path in ("first", "second")]
        for number in range(2):
            await settle()
            # One at a time, as the scheduler does not say which one it answers.
            self.assertEqual(len(manager.dispatched), number + 1)
            answer(manager, number)
        done, pending = await asyncio.wait(tasks, timeout=5)
        self.assertFalse(pending)
        messages = [task.result()[1] for task in tasks]
        self.assertEqual(messages, ["first", "second"])

    def test_two_updates_each_have_their_answer(self):
        for is_paused in (True, False):
            with self.subTest(is_paused=is_paused):
                asyncio.run(self.run_two(is_paused))

    def test_generation_continues_after_the_update(self):
        async def run():
            manager = make_manager(is_paused=True)
            task = self.update(manager, "first")
            await settle()
            self.assertTrue(manager.is_pause_cond.locked())
            answer(manager, 0)
            await task
            self.assertFalse(manager.is_pause_cond.locked())

        asyncio.run(run())


if __name__ == "__main__":
    unittest.main()

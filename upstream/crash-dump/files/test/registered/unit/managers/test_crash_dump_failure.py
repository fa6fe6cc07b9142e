"""A crash dump that cannot be written does not keep the server from being killed.

python test/registered/unit/managers/test_crash_dump_failure.py
"""

import asyncio
import os
import tempfile
import threading
import unittest
from unittest.mock import Mock, patch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.managers import tokenizer_manager
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import (
    ReqState,
    SignalHandler,
    TokenizerManager,
    print_exception_wrapper,
)
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats
from sglang.srt.runtime_context import publish, restore_context, snapshot_context
from sglang.srt.server_args import ServerArgs

register_cpu_ci(est_time=10, suite="base-a-test-cpu")


class TestCrashDumpFailure(CustomTestCase):
    def setUp(self):
        self.addCleanup(restore_context, snapshot_context())
        self.server_args = ServerArgs(model_path="dummy")
        publish(self.server_args, role="tokenizer")
        kill = patch.object(tokenizer_manager, "kill_process_tree")
        self.kill = kill.start()
        self.addCleanup(kill.stop)

    def make_manager(self, folder, image_data=None) -> TokenizerManager:
        """Make one with an unfinished request."""
        manager = TokenizerManager.__new__(TokenizerManager)
        manager.server_args = self.server_args
        manager.crash_dump_folder = folder
        manager.crash_dump_performed = False
        manager.crash_dump_request_list = []
        manager._subprocess_watchdog = None
        manager._dump_config_snapshot = Mock(return_value=None)
        obj = GenerateReqInput(rid="rid", input_ids=[1], image_data=image_data)
        state = ReqState([], False, asyncio.Event(), obj, APIServerReqTimeStats())
        manager.rid_to_state = {"rid": state}
        return manager

    def assert_killed(self, manager):
        SignalHandler(manager).running_phase_sigquit_handler()
        self.kill.assert_called_once_with(os.getpid())

    def test_dump_is_written(self):
        with tempfile.TemporaryDirectory() as folder:
            self.assert_killed(self.make_manager(folder))
            dumps = [name for _, _, names in os.walk(folder) for name in names]
        self.assertEqual(len(dumps), 1)

    def test_request_that_cannot_be_pickled(self):
        with tempfile.TemporaryDirectory() as folder:
            manager = self.make_manager(folder, image_data=[threading.Lock()])
            self.assert_killed(manager)

    def test_folder_that_cannot_be_written(self):
        with tempfile.NamedTemporaryFile() as file:
            self.assert_killed(self.make_manager(file.name))

    def test_exception_in_the_event_loop(self):
        with tempfile.NamedTemporaryFile() as file:
            manager = self.make_manager(file.name)
            manager.handle_loop = Mock(side_effect=RuntimeError)
            manager.handle_loop.__self__ = manager
            with self.assertRaises(SystemExit):
                asyncio.run(print_exception_wrapper(manager.handle_loop))
        self.kill.assert_called_once_with(os.getpid(), include_parent=True)


if __name__ == "__main__":
    unittest.main()

"""onnx's passes in a process of their own, which a file may end without ending ours."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from diffcam_export import apart


def model(opset: int = 13) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 3]) for n in "xy")
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        "g", [x], [y],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def test_passes_do_what_onnx_does() -> None:
    inferred = apart.infer(model())
    [info] = inferred.graph.value_info
    assert [d.dim_value for d in info.type.tensor_type.shape.dim] == [1, 3]
    assert apart.convert(model()).opset_import[0].version == apart.OPSET
    assert len(apart.write_out(model()).graph.node) == 2


def test_what_onnx_refuses_is_told_and_the_next_file_is_read() -> None:
    wrong = model()
    wrong.graph.node[0].op_type = "Relux"
    with pytest.raises(apart.PassError, match="Relux"):
        apart.convert(wrong)
    assert apart.infer(model()).graph.value_info


def test_a_crash_ends_the_other_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    apart.infer(model())
    child = apart._process._child
    assert child is not None
    child.kill()
    child.wait()
    # One that died between two requests is not missed.
    assert apart.infer(model()).graph.value_info
    process = apart._Process()
    crashing = "import sys; sys.stdin.buffer.read(1); import os; os.abort()"
    real = subprocess.Popen
    monkeypatch.setattr(
        apart.subprocess,
        "Popen",
        lambda command, **kw: real([sys.executable, "-c", crashing], **kw),
    )
    with pytest.raises(apart.PassError, match="crashed or ran out of memory over it"):
        process.ask("infer", b"x" * 2**20)
    monkeypatch.undo()
    assert process.ask("infer", model().SerializeToString())


def test_it_may_not_take_all_memory_nor_all_time(monkeypatch: pytest.MonkeyPatch) -> None:
    size = helper.make_tensor("n", TensorProto.INT64, [1], [2**40])
    zero = helper.make_tensor("z", TensorProto.INT64, [1], [0])
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["c"], value=zero),
        helper.make_node("Identity", ["c"], ["y"]),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.INT64, ["k"])
    graph = helper.make_graph(nodes, "g", [], [y], initializer=[size])
    huge = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    with contextlib.suppress(apart.PassError):
        apart.infer(huge)
    assert apart.infer(model()).graph.value_info
    monkeypatch.setattr(apart, "_LIMIT", 0.2)
    process = apart._Process()
    real = subprocess.Popen
    instead = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(apart.subprocess, "Popen", lambda command, **kw: real(instead, **kw))
    start = time.monotonic()
    with pytest.raises(apart.PassError, match=r"more than 0\.2 s"):
        process.ask("infer", b"")
    assert time.monotonic() - start < 20


def test_a_forked_process_gets_one_of_its_own() -> None:
    apart.infer(model())
    child = apart._process._child
    assert child is not None
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        own = apart._process._running()
        os.write(writer, b"other" if own.pid != child.pid else b"same")
        own.kill()
        os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(reader, 9) == b"other"
    assert apart.infer(model()).graph.value_info


def test_it_ends_with_who_started_it(tmp_path: Path) -> None:
    code = (
        "from diffcam_export import apart; import onnx; apart.infer(onnx.ModelProto());"
        "print(apart._process._child.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    pid = int(done.stdout)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()


def test_it_takes_no_more_than_its_parent_may() -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2**31, 2**31));"
        "from diffcam_export import apart; import onnx; apart.infer(onnx.ModelProto())"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

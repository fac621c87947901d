from tasks.benchmark.clocks import Gauge, reasons


def test_reasons_have_names_and_unknown_bits_their_value():
    assert reasons(0) == []
    assert reasons(0x1) == ["gpu idle"]
    assert reasons(0x4 | 0x40) == ["power cap", "hardware thermal slowdown"]
    assert reasons(0x2000) == ["reason 0x2000"]


def test_without_a_gpu_only_the_host_is_read():
    gauge = Gauge()
    assert list(gauge.read()) == ["load_1min"]
    assert gauge.used_bytes() is None


def test_a_gpu_that_cannot_be_asked_is_not_made_up():
    gauge = Gauge("GPU-00000000-0000-0000-0000-000000000000")
    assert list(gauge.read()) == ["load_1min"]
    assert gauge.used_bytes() is None

"""Holds what gantry publishes against tools that are not gantry's.

Usage: published.py GANTRY SAMPLE...    (each SAMPLE is a VM's file that `gantry run` takes)
"""

import http.client
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

import jsonschema
from openapi_spec_validator import validate
from prometheus_client import parser as text_format
from prometheus_client.openmetrics import parser

DIALECT = jsonschema.Draft202012Validator


class Unix(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path):
        super().__init__("localhost", timeout=30)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def ask(path, verb, url, body=None):
    """Status and body of an answer."""
    connection = Unix(path)
    connection.request(verb, url, body and json.dumps(body))
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def wait(path, process):
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            return ask(path, "GET", "/api/v1/vmm.ping")
        except OSError:
            time.sleep(0.05)
    raise SystemExit(f"gantry does not answer on {path}")


def check_document(document):
    validate(document)
    operations = [(path, verb, operation) for path, verbs in document["paths"].items()
                  for verb, operation in verbs.items()]
    ids = [operation.get("operationId") for _, _, operation in operations]
    assert all(ids) and len(set(ids)) == len(ids), f"operations without an id of their own: {ids}"
    for name, schema in document["components"]["schemas"].items():
        DIALECT.check_schema(schema)
        assert schema, name
    return len(operations)


def check_schema(schema, samples):
    DIALECT.check_schema(schema)
    validator = DIALECT(schema)
    for sample in samples:
        errors = [error.message for error in validator.iter_errors(sample)]
        assert not errors, f"the schema refuses {json.dumps(sample)[:200]}: {errors}"
    for wrong in ({}, {"payload": {}}, {"payload": {"kernel": "k", "firmware": "f"}},
                  {"payload": {"kernel": "k"}, "disk": []},
                  {"payload": {"kernel": "k"}, "cpus": {"boot_vcpus": 0}},
                  {"payload": {"kernel": "k"}, "devices": [{"group": "a", "path": "b"}]}):
        assert not validator.is_valid(wrong), f"the schema accepts {wrong}"
    return validator


def check_metrics(text, name):
    families = list(parser.text_string_to_metric_families(text))
    names = {family.name for family in families}
    assert name in names, f"no {name} in {names}"
    return len(families)


def check_all(command):
    """What `gantry metrics` prints, in the older text format."""
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    families = {family.name: family for family in text_format.text_string_to_metric_families(text)}
    assert families["gantry_vm_up"].samples[0].value == 1, text
    assert families["gantry_vm_state"].type == "gauge", text
    assert families["gantry_api_requests"].type == "counter", text
    return len(families)


def of(document, name):
    """A validator for one of the document's schemas."""
    return DIALECT({"$ref": f"#/components/schemas/{name}", **document})


def check_vm(path, document, schema, kernel):
    """A VM that is created, as the API shows it."""
    config = {"payload": {"kernel": kernel}, "devices": [{"group": "nvme", "id": "disk"}],
              "numa_nodes": [0], "hotplug": {"slots": 2}, "serial": {"mode": "Null"}}
    status, answer = ask(path, "PUT", "/api/v1/vm.create", config)
    assert status == 204, answer
    status, answer = ask(path, "GET", "/api/v1/vm.info")
    info = json.loads(answer)
    of(document, "VmInfo").validate(info)
    schema.validate(info["config"])
    assert info["config"]["devices"][0]["id"] == "disk", answer
    status, text = ask(path, "GET", "/metrics")
    return check_metrics(text, "gantry_vm_state")


def main(gantry, samples):
    samples = [json.loads(pathlib.Path(sample).read_text()) for sample in samples]
    printed = subprocess.run([gantry, "schema"], check=True, capture_output=True).stdout
    schema = check_schema(json.loads(printed), samples)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/vm.sock"
        arguments = [gantry, "--run-dir", folder, "run", "--api-socket", path]
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL)
        try:
            wait(path, process)
            document = json.loads(ask(path, "GET", "/api/v1/openapi.json")[1])
            operations = check_document(document)
            families = check_metrics(ask(path, "GET", "/metrics")[1], "gantry_api_requests")
            families += check_vm(path, document, schema, gantry)
            families += check_all([gantry, "--run-dir", folder, "metrics"])
            ask(path, "PUT", "/api/v1/vmm.shutdown")
            assert process.wait(30) == 0
        finally:
            process.kill()
    print(f"published: {operations} operations, {len(samples)} samples, {families} families of metrics")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

"""A key that never leaves its token: SoftHSM's PKCS#11 module, where it is installed.

    apt-get install softhsm2 && pip install pykcs11

or `ENGINERY_TEST_PKCS11` names the module (libsofthsm2.so) of another place.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from artifacts.errors import TrustError
from artifacts.refs import digest_bytes
from artifacts.signing import check_signature, hint_of, public_key

MODULES = [
    os.environ.get("ENGINERY_TEST_PKCS11", ""),
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
]
CONTENTS = {"manifest.json": digest_bytes(b"{}")}
# In a process of its own: a module reads its settings once.
_MAKE_AND_SIGN = """
import base64, json, sys
import PyKCS11
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from artifacts.errors import SigningError
from artifacts.signing import open_signer

module, contents = sys.argv[1], json.loads(sys.argv[2])
library = PyKCS11.PyKCS11Lib()
library.load(module)
slot = library.getSlotList()[0]
library.initToken(slot, "so-pin-4321", f"{'enginery':<32}")
slot = library.getSlotList(tokenPresent=True)[0]  # the module has given it another number
session = library.openSession(slot, PyKCS11.CKF_SERIAL_SESSION | PyKCS11.CKF_RW_SESSION)
session.login("so-pin-4321", user_type=PyKCS11.CKU_SO)
session.initPin("pin-1234")
session.logout()
session.login("pin-1234")
common = [(PyKCS11.CKA_KEY_TYPE, PyKCS11.CKK_ECDSA), (PyKCS11.CKA_LABEL, "release"), (PyKCS11.CKA_ID, (1,)),
          (PyKCS11.CKA_TOKEN, True)]
public, _private = session.generateKeyPair(
    [(PyKCS11.CKA_EC_PARAMS, bytes.fromhex("06082a8648ce3d030107")), (PyKCS11.CKA_VERIFY, True), *common],
    [(PyKCS11.CKA_PRIVATE, True), (PyKCS11.CKA_SIGN, True), *common],
    mecha=PyKCS11.Mechanism(PyKCS11.CKM_EC_KEY_PAIR_GEN, None),
)
point = bytes(session.getAttributeValue(public, [PyKCS11.CKA_EC_POINT])[0])[2:]
pem = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point).public_bytes(
    serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
)
session.logout()
session.closeSession()
address = f"pkcs11:token=enginery;object={{}}?pin-value={{}}&module-path={module}"
answer = {"public": pem.decode()}
def refused(name, pin):
    try:
        open_signer(address.format(name, pin))
    except SigningError as err:
        return str(err)


answer["release"] = refused("release", "pin-9999")
signer = open_signer(address.format("release", "pin-1234"))
again = open_signer(address.format("release", "pin-1234"))  # a process may log in only once
answer |= {"signature": again.sign("digits", contents).decode(), "fingerprint": signer.fingerprint}
print(json.dumps(answer))
"""


def test_a_key_in_a_token_signs(tmp_path: Path) -> None:
    if find_spec("PyKCS11") is None:
        pytest.skip("PyKCS11 is not installed (pip install pykcs11)")
    module = next((path for path in MODULES if path and Path(path).is_file()), None)
    if module is None:
        pytest.skip("no SoftHSM module (apt-get install softhsm2, or ENGINERY_TEST_PKCS11=.../libsofthsm2.so)")
    (tmp_path / "tokens").mkdir()
    settings = tmp_path / "softhsm2.conf"
    settings.write_text(f"directories.tokendir = {tmp_path}/tokens\nobjectstore.backend = file\nlog.level = ERROR\n")
    done = subprocess.run(
        [sys.executable, "-c", _MAKE_AND_SIGN, module, json.dumps(CONTENTS)],
        env={**os.environ, "SOFTHSM2_CONF": str(settings)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    fingerprint, pem = public_key(answer["public"].encode())
    signature = answer["signature"].encode()
    assert hint_of(signature) == answer["fingerprint"] == fingerprint
    check_signature(signature, CONTENTS, pem)
    with pytest.raises(TrustError):
        check_signature(signature, {"manifest.json": digest_bytes(b"other")}, pem)
    assert "CKR_PIN_INCORRECT" in answer["release"]
    assert "pin-" not in answer["release"]

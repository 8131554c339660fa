#!/usr/bin/env python3
"""Makes libraries that torch's CUDA build can be loaded with where there is no CUDA.

    stub_cuda.py TORCH_LIB_DIR        needs gcc and binutils

What torch's libraries need, by name and version of symbol, is read from them; each function
answers 100, which is "no device".
"""

import collections
import glob
import os
import re
import subprocess
import sys
import tempfile

SYSTEM = re.compile(r"(libc|libm|libdl|librt|libpthread|libstdc\+\+|libgcc_s|libgomp)\.so|ld-linux")
SYSTEM_VERSION = ("GLIBC", "GCC", "CXXABI", "GOMP", "OMP")
CUDA = re.compile(r"^(cu|nccl|nv|__cuda|_cu|cusparseLt)")
# Libraries whose symbols' version is not their own name.
VERSIONS = {"libnvshmem_host.so.3": "NVSHMEM"}


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def main():
    folder = sys.argv[1]
    libraries = glob.glob(folder + "/*.so*") + glob.glob(os.path.dirname(folder) + "/_C.*.so")
    present = {os.path.basename(path) for path in libraries}
    needed, wanting, defined = set(), set(), set()
    for path in libraries:
        for name in re.findall(r"\(NEEDED\).*\[(.+?)\]", output("readelf", "-d", path)):
            if name not in present and not SYSTEM.match(name):
                needed.add(name)
                wanting.add(path)
        for line in output("nm", "-D", "--defined-only", path).splitlines():
            defined.add(line.split()[-1].split("@")[0])
    symbols = collections.defaultdict(set)  # by version; "" for those without
    for path in wanting:
        for line in output("nm", "-D", "--undefined-only", "--with-symbol-versions", path).splitlines():
            name, _, version = line.split()[-1].partition("@")
            version = version.lstrip("@")
            if version.startswith(SYSTEM_VERSION) or name in defined:
                continue
            if version or CUDA.match(name):
                symbols[version].add(name)
    work = tempfile.mkdtemp(prefix="stubs")
    # Those without a version are looked for everywhere, so that one library can have them all.
    rest = sorted(symbols[""])
    for library in sorted(needed):
        version = VERSIONS.get(library, library)
        own = sorted(symbols.get(version, ()))
        with open(f"{work}/{library}.c", "w") as file:
            for name in own + [name for name in rest if name not in own]:
                # Registrations at load time return handles, which may be null.
                answer = 0 if name.startswith("__cuda") else 100
                file.write(f"int {name}(void){{return {answer};}}\n")
        with open(f"{work}/{library}.map", "w") as file:
            names = f"global: {' '.join(name + ';' for name in own)}" if own else ""
            file.write(f"{version} {{ {names} }};\n")
            if rest:
                file.write(f"STUB {{ global: {' '.join(name + ';' for name in rest)} }};\n")
        subprocess.check_call([
            "gcc", "-w", "-shared", "-fPIC", "-nostdlib", "-O1", f"-Wl,-soname,{library}",
            f"-Wl,--version-script={work}/{library}.map", "-o", f"{folder}/{library}", f"{work}/{library}.c",
        ])
        print(f"{library}: {len(own) + len(rest)} functions")
        rest = []


main()

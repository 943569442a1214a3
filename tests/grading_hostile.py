"""Files that try to take points which nobody earned, to harm others, or to stop the grader.

Each is a starter, with nothing solved, and the code below behind it: whatever it gets beyond
nothing is stolen. `HARM` are solved lessons that do harm: they keep what they earned.
"""

from __future__ import annotations

# Behind the starter: what the thief looks for, and puts where the exercise's part should be.
PREFIX = """
PARTS, FILE, ROOTS, PLACES, sys_path = HEAD

def use(found):
    for name in PARTS:
        if name in found and found[name] is not globals().get(name):
            globals()[name] = found[name]
"""

THEFT: dict[str, str] = {
    "frames: locals of the loader": """
import sys, marshal, types
frame = sys._getframe()
while frame is not None:
    for value in list(frame.f_locals.values()):
        if isinstance(value, dict):
            use({k: v for k, v in value.items() if isinstance(v, type)})
        if isinstance(value, dict):
            for inner in list(value.values()):
                if isinstance(inner, str) and 'def forward' in inner:
                    exec(inner, globals())
    frame = frame.f_back
""",
    "gc: every class alive": """
import gc
use({o.__name__: o for o in gc.get_objects() if isinstance(o, type)})
""",
    "gc: every function alive": """
import gc, types
use({o.__name__: o for o in gc.get_objects() if isinstance(o, types.FunctionType)})
""",
    "gc: code objects": """
import gc, types
for o in gc.get_objects():
    if isinstance(o, types.CodeType) and o.co_name in PARTS:
        try:
            exec(o, globals())
        except Exception:
            pass
""",
    "gc: dictionaries with sources": """
import gc
for o in gc.get_objects():
    if isinstance(o, dict):
        for name in PARTS:
            try:
                text = o.get(name)
                if isinstance(text, str) and 'def ' in text:
                    exec(text, globals())
            except Exception:
                pass
""",
    "sys.modules: every module": """
import sys
for module in list(sys.modules.values()):
    try:
        use(vars(module))
    except TypeError:
        pass
""",
    "import of the reference": """
import importlib
for name in ('common.augmentation', '01_resnet_beginner', 'common.lessons'):
    try:
        use(vars(importlib.import_module('.'.join(name.split('.')))))
    except Exception:
        pass
""",
    "load_lesson by a hidden name": """
module = __import__('common' + '.less' + 'ons', fromlist=['x'])
for number in range(1, 9):
    for call in ('load_' + 'lesson', 'get_' + 'model'):
        try:
            use(vars(getattr(module, call)(f'{number:02d}')))
        except Exception:
            pass
""",
    "inspect.getsource of what is left": """
import inspect
for value in list(globals().values()):
    try:
        exec(inspect.getsource(value), globals())
    except Exception:
        pass
""",
    "open the lesson": """
import glob
for pattern in ('/*/*/0*_*.py', '/tmp/*/*/0*_*.py', '/**/0?_*.py'):
    for path in glob.glob(pattern)[:50]:
        try:
            exec(open(path).read().split('# %% [markdown]')[3], globals())
        except Exception:
            pass
""",
    "os.open the lesson": """
import os
for root in ROOTS:
    for name in (FILE, 'common/augmentation.py'):
        try:
            fd = os.open(os.path.join(root, name), os.O_RDONLY)
            text = os.read(fd, 1 << 20).decode()
            scope = dict(globals()); scope['__name__'] = 'x'
            exec(text, scope)
            use(scope)
        except Exception:
            pass
""",
    "mmap the lesson": """
import mmap, os
for root in ROOTS:
    try:
        with open(os.path.join(root, FILE), 'rb') as f:
            text = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)[:].decode()
        scope = dict(globals()); exec(text, scope); use(scope)
    except Exception:
        pass
""",
    "subprocess cat": """
import subprocess, os
for root in ROOTS:
    try:
        text = subprocess.run(['cat', os.path.join(root, FILE)], capture_output=True, text=True).stdout
        scope = dict(globals()); exec(text, scope); use(scope)
    except Exception:
        pass
""",
    "subprocess python": """
import subprocess, os, sys
for root in ROOTS:
    try:
        text = subprocess.run([sys.executable, '-c', f'print(open({os.path.join(root, FILE)!r}).read())'], capture_output=True, text=True).stdout
        scope = dict(globals()); exec(text, scope); use(scope)
    except Exception:
        pass
""",
    "git show": """
import subprocess
for root in ROOTS:
    try:
        text = subprocess.run(['git', '-C', root, 'show', 'HEAD:' + FILE], capture_output=True, text=True).stdout
        scope = dict(globals()); exec(text, scope); use(scope)
    except Exception:
        pass
""",
    "git objects by hand": """
import glob, zlib
for root in ROOTS:
    for path in glob.glob(root + '/.git/objects/*/*')[:3000]:
        try:
            text = zlib.decompress(open(path, 'rb').read()).split(b'\\0', 1)[1].decode()
            if any('class ' + p in text or 'def ' + p in text for p in PARTS):
                scope = dict(globals()); exec(text, scope); use(scope)
        except Exception:
            pass
""",
    "pycache": """
import glob, marshal
for root in ROOTS:
    for path in glob.glob(root + '/**/__pycache__/*.pyc', recursive=True)[:500]:
        try:
            scope = dict(globals()); exec(marshal.loads(open(path, 'rb').read()[16:]), scope); use(scope)
        except Exception:
            pass
""",
    "a link to the lesson": """
import os
for root in ROOTS:
    try:
        os.symlink(os.path.join(root, FILE), 'mine.txt')
        scope = dict(globals()); exec(open('mine.txt').read(), scope); use(scope)
    except Exception:
        pass
    try:
        os.unlink('mine.txt')
    except OSError:
        pass
""",
    "ctypes open": """
import ctypes, os
libc = ctypes.CDLL(None)
for root in ROOTS:
    fd = libc.open(os.path.join(root, FILE).encode(), 0)
    if fd >= 0:
        try:
            scope = dict(globals()); exec(os.read(fd, 1 << 20).decode(), scope); use(scope)
        except Exception:
            pass
""",
    "proc: memory of the parent": """
import os
for pid in [p for p in os.listdir('/proc') if p.isdigit()] if os.access('/proc', os.R_OK) else [os.getppid()]:
    try:
        maps = open(f'/proc/{pid}/maps').read()
        for line in maps.splitlines():
            if '[heap]' in line:
                a, b = (int(x, 16) for x in line.split()[0].split('-'))
                f = open(f'/proc/{pid}/mem', 'rb'); f.seek(a)
                text = f.read(b - a).decode('utf-8', 'ignore')
    except OSError:
        pass
""",
    "torchvision.models": """
import sys
tv = __import__('torch' + 'vision')
models = getattr(tv, 'mod' + 'els')
for cls in ('BasicBlock', 'Bottleneck'):
    try:
        use({cls: getattr(getattr(models, 'res' + 'net'), cls)})
    except Exception:
        pass
""",
    "torchvision.ops.misc": """
ops = __import__('torch' + 'vision.ops', fromlist=['misc'])
class SqueezeExcitation(nn.Module):
    def __init__(self, channels, reduction=16):
        super().__init__()
        self.inner = getattr(getattr(ops, 'misc'), 'Squeeze' + 'Excitation')(channels, channels // reduction)
    def forward(self, x):
        return self.inner(x)
""",
    "torchvision by its file": """
import importlib.util, sysconfig
for folder in sys_path:
    try:
        spec = importlib.util.spec_from_file_location('tv_misc', folder + '/torchvision/ops/misc.py')
        module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
        use({'SqueezeExcitation': module.SqueezeExcitation})
    except Exception:
        pass
""",
    "timm": """
try:
    use(vars(__import__('ti' + 'mm')))
except Exception:
    pass
""",
    "kept in a shared folder": """
import gc, marshal, os, types
kept = {}
for o in gc.get_objects():
    if isinstance(o, types.FunctionType) and o.__code__.co_filename == '<reference>':
        kept[o.__qualname__] = marshal.dumps(o.__code__)
for place in PLACES:
    try:
        for name, code in kept.items():
            open(f'{place}/kept-{name}', 'wb').write(code)
            os.chmod(f'{place}/kept-{name}', 0o666)
    except OSError:
        pass
    try:
        for name in os.listdir(place):
            if name.startswith('kept-'):
                owner, _, method = name[5:].rpartition('.')
                code = marshal.loads(open(f'{place}/{name}', 'rb').read())
                if owner in globals():
                    cells = tuple(types.CellType(globals()[owner]) for _ in code.co_freevars)
                    setattr(globals()[owner], method, types.FunctionType(code, globals(), method, None, cells))
                elif not owner:
                    globals()[method] = types.FunctionType(code, globals(), method)
    except OSError:
        pass
""",
    "kept in shared memory": """
from multiprocessing import shared_memory
import gc, marshal, types
codes = {}
for o in gc.get_objects():
    if isinstance(o, types.FunctionType) and o.__code__.co_filename == '<reference>':
        codes[o.__name__] = o.__code__
for name in PARTS:
    try:
        data = bytes(shared_memory.SharedMemory(name='kept_' + name).buf)
        globals()[name] = types.FunctionType(marshal.loads(data), globals(), name)
    except Exception:
        pass
for name, code in codes.items():
    try:
        data = marshal.dumps(code)
        memory = shared_memory.SharedMemory(name='kept_' + name, create=True, size=len(data))
        memory.buf[: len(data)] = data
    except Exception:
        pass
""",
    "kept in an abstract socket": """
import os, socket, time
try:
    if os.fork() == 0:
        os.setsid()
        s = socket.socket(socket.AF_UNIX); s.bind('\\0kept'); s.listen()
        time.sleep(60)
        os._exit(0)
except OSError:
    pass
""",
    "the network": """
import socket
for host in ('127.0.0.1', '8.8.8.8'):
    for port in (80, 8000):
        try:
            socket.create_connection((host, port), timeout=0.5)
        except OSError:
            pass
""",
    "json.dumps forged": """
import json
real = json.dumps
made_up = {'shapes': [], 'eval': [], 'train': [], 'zero': [], 'parameters': 0, 'layers': [], 'initial': [], 'slots': [],
           'no_gradient': [], 'input_gradient': [], 'eval_repeats': True, 'eval_changes': [], 'train_is_eval': True,
           'train_repeats': True, 'train_changes': 0, 'value': True}
def forged(answer, *args, **options):
    if isinstance(answer, dict) and 'number' in answer:
        answer = {**made_up, 'number': answer['number']}
    return real(answer, *args, **options)
json.dumps = forged
""",
    "json encoder forged": """
import json.encoder
real = json.encoder.JSONEncoder.encode
def forged(self, answer):
    if isinstance(answer, dict) and 'number' in answer:
        answer = {'number': answer['number'], 'eval': [], 'train': [], 'zero': [], 'shapes': [], 'layers': [], 'parameters': 0}
    return real(self, answer)
json.encoder.JSONEncoder.encode = forged
""",
    "the probes patched": """
import sys
for name, module in list(sys.modules.items()):
    if name.endswith('probes'):
        module.Submission.observe = lambda self, **question: {'eval': [], 'train': [], 'zero': [], 'shapes': [], 'layers': [], 'parameters': 0}
        module.Submission.evaluate = lambda self, **question: {'value': True}
        module.plain = lambda value, most=0: []
        module._equal = lambda a, b: True
""",
    "torch.equal": "torch.equal = torch.allclose = lambda *a, **k: True\n",
    "Tensor.__eq__": "torch.Tensor.__eq__ = lambda a, b: True\ntorch.Tensor.equal = lambda a, b: True\n",
    "nn.Module.parameters": "nn.Module.parameters = lambda self, recurse=True: iter(())\n",
    "named_modules": "nn.Module.named_modules = lambda self, *a, **k: iter(())\n",
    "isinstance": "import builtins\nbuiltins.isinstance = lambda a, b: True\n",
    "sum": "import builtins\nbuiltins.sum = lambda *a, **k: 0\n",
    "an answer laid out beforehand": """
import os
for fd in range(3, 10):
    try:
        os.write(fd, b'{"number": "0", "value": true}' + bytes([10]))
    except OSError:
        pass
""",
    "the connection taken over": """
import gc, socket, json
for o in gc.get_objects():
    if isinstance(o, socket.socket):
        try:
            o.sendall(b'{"number": "x"}' + bytes([10]))
        except OSError:
            pass
""",
    "an object equal to all": """
class Equal:
    def __eq__(self, other): return True
    def __hash__(self): return 0
for name in PARTS:
    if name.islower():
        globals()[name] = lambda *a, **k: Equal()
""",
    "NotImplemented": """
for name in PARTS:
    if name.islower():
        globals()[name] = lambda *a, **k: NotImplemented
""",
    "a dictionary with $tensor": """
for name in PARTS:
    if name.islower():
        globals()[name] = lambda *a, **k: {'$tensor': ['float64', [], '']}
""",
    "an audit hook": """
import sys
sys.addaudithook(lambda event, args: None)
""",
    "a trace": """
import sys
def trace(frame, event, arg):
    if 'theirs' in frame.f_locals:
        use(frame.f_locals['theirs'])
    return trace
sys.settrace(trace)
""",
    "builtins.open": """
import builtins
builtins.open = lambda *a, **k: None
""",
    "a module in the way": """
import sys, types
fake = types.ModuleType('json'); fake.loads = lambda *a: {'probe': 'load', 'number': 0}; fake.dumps = lambda *a: '{}'
sys.modules['json'] = fake
""",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\n",
}

HARM: dict[str, str] = {
    "endless import": "while True:\n    pass\n",
    "a signal handler": "import signal\nfor s in range(1, 30):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n    pass\n",
    "sleep": "import time\ntime.sleep(999)\n",
    "exit": "import os\nos._exit(0)\n",
    "sys.exit": "import sys\nsys.exit(0)\n",
    "raise SystemExit": "raise SystemExit\n",
    "KeyboardInterrupt": "raise KeyboardInterrupt\n",
    "a crash": "import ctypes\nctypes.string_at(0)\n",
    "abort": "import os\nos.abort()\n",
    "recursion": "def f():\n    f()\nimport sys\nsys.setrecursionlimit(10**9)\nf()\n",
    "threads": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()\n",
    "forks": "import os, time\nfor _ in range(200):\n    if os.fork() == 0:\n        os.setsid()\n        time.sleep(999)\ntime.sleep(999)\n",
    "a fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n",
    "memory": "hoard = []\nwhile True:\n    hoard.append(bytearray(2**24))\n",
    "a tensor": "torch.zeros(25 * 10**9)\n",
    "a print of 1 GB": "for _ in range(1000):\n    print('x' * 10**6)\n",
    "many prints": "for _ in range(10**6):\n    print('x')\n",
    "os.write of 1 GB": "import os\nfor _ in range(1000):\n    os.write(1, b'x' * 10**6)\n",
    "a thousand threads of torch": "torch.set_num_threads(1000)\n",
    "closed streams": "import sys\nsys.stdout.close()\nsys.stderr.close()\n",
    "streams gone": "import sys\nsys.stdout = sys.stderr = None\n",
    "closed descriptors": "import os\nos.closerange(0, 99)\n",
    "files": "for i in range(100000):\n    open(f'f{i}', 'w').write('x')\n    if i > 2000: break\n",
    "a large file": "open('f', 'wb').write(b'x' * 10**9)\n",
    "kills": "import ctypes, os\nfor pid in (os.getppid(), GRADER):\n    ctypes.CDLL(None).kill(pid, 9)\n",
    "kills all": "import ctypes\nctypes.CDLL(None).kill(-1, 9)\n",
    "vandal": "for path in VICTIMS:\n    try:\n        open(path, 'w').write('score,100')\n    except OSError:\n        pass\n",
    "removes": "import os\nfor path in VICTIMS:\n    try:\n        os.unlink(path)\n    except OSError:\n        pass\n",
    "chmod": "import os\nfor path in VICTIMS:\n    try:\n        os.chmod(path, 0)\n    except OSError:\n        pass\n",
    "a deep nest": "x = " + "(" * 300 + ")" * 300 + "\n",
    "zero bytes": "\0\n",
    "escape sequences": "raise ValueError('\\x1b[2J\\x1b[31m' * 50)\n",
    "an exception that can't be printed": "class E(Exception):\n    def __str__(self):\n        raise ValueError\nraise E\n",
    "no gradients for anybody": "torch.set_grad_enabled(False)\n",
    "double for anybody": "torch.set_default_dtype(torch.float64)\n",
    "a syntax error": "class (:\n",
}

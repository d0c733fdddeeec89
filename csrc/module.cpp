// An empty Python module, so that `import lowmem._C` is no error. The operators are registered by static initialisers
// when torch.ops.load_library opens the file (lowmem/_dispatch.py). Compiled once into each operator library.
#include <Python.h>

#define LOWMEM_PASTE_(a, b) a##b
#define LOWMEM_PASTE(a, b) LOWMEM_PASTE_(a, b)
#define LOWMEM_TEXT_(a) #a
#define LOWMEM_TEXT(a) LOWMEM_TEXT_(a)

PyMODINIT_FUNC LOWMEM_PASTE(PyInit_, TORCH_EXTENSION_NAME)() {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT,
      LOWMEM_TEXT(TORCH_EXTENSION_NAME),
      nullptr,
      -1,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
      nullptr,
  };
  return PyModule_Create(&module);
}

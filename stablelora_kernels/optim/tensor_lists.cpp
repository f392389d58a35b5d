// Loops over lists of tensors. tensor_lists.py says what each function returns, and compiles this file with the headers of
// the torch that is installed. Functions return None for lists that hold anything unusual, which Python then reads.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <ATen/core/TensorBase.h>

#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

namespace {

using c10::TensorImpl;

PyTypeObject* tensor_type = nullptr;
PyTypeObject* parameter_type = nullptr;
// Where a tensor's Python object holds the address of its TensorImpl.
size_t impl_offset = 0;

TensorImpl* impl_at(PyObject* object, size_t offset) {
  TensorImpl* impl;
  std::memcpy(&impl, reinterpret_cast<char*>(object) + offset, sizeof impl);
  return impl;
}

// connect(Tensor, Parameter, example, example._cdata)
PyObject* connect(PyObject*, PyObject* args) {
  PyObject *example, *address;
  if (!PyArg_ParseTuple(
          args, "O!O!OO", &PyType_Type, &tensor_type, &PyType_Type, &parameter_type, &example, &address))
    return nullptr;
  const void* expected = PyLong_AsVoidPtr(address);
  if (!expected) return nullptr;
  const size_t end = static_cast<size_t>(Py_TYPE(example)->tp_base->tp_basicsize);
  for (size_t offset = sizeof(PyObject); offset + sizeof expected <= end; offset += sizeof expected) {
    if (impl_at(example, offset) == expected) {
      impl_offset = offset;
      Py_INCREF(tensor_type);
      Py_INCREF(parameter_type);
      Py_RETURN_NONE;
    }
  }
  PyErr_SetString(PyExc_RuntimeError, "a tensor's Python object does not hold its TensorImpl");
  return nullptr;
}

// The length of a list of tensors of no subclass but Parameter, or -1.
Py_ssize_t plain_length(PyObject* tensors) {
  if (!PyList_CheckExact(tensors)) return -1;
  const Py_ssize_t n = PyList_GET_SIZE(tensors);
  for (Py_ssize_t i = 0; i < n; i++) {
    PyTypeObject* type = Py_TYPE(PyList_GET_ITEM(tensors, i));
    if (type != tensor_type && type != parameter_type) return -1;
  }
  return n;
}

TensorImpl* impl_of(PyObject* tensors, Py_ssize_t i) {
  return impl_at(PyList_GET_ITEM(tensors, i), impl_offset);
}

using Words = std::vector<int64_t>;

// Append the address of a dense tensor, and its dtype, device, sizes and strides. False for any other tensor.
bool append_layout(TensorImpl* impl, Words& addresses, Words& forms) {
  if (impl->layout() != c10::kStrided || impl->key_set().has(c10::DispatchKey::Python)) return false;
  addresses.push_back(static_cast<int64_t>(reinterpret_cast<intptr_t>(impl->mutable_data())));
  const c10::Device device = impl->device();
  const c10::IntArrayRef sizes = impl->sizes(), strides = impl->strides();
  forms.push_back(static_cast<int64_t>(c10::typeMetaToScalarType(impl->dtype())));
  forms.push_back(static_cast<int64_t>(device.type()) << 32 | static_cast<uint8_t>(device.index()));
  forms.push_back(static_cast<int64_t>(sizes.size()));
  forms.insert(forms.end(), sizes.begin(), sizes.end());
  forms.insert(forms.end(), strides.begin(), strides.end());
  return true;
}

PyObject* layout_of(PyObject* tensors, bool of_gradients) {
  const Py_ssize_t n = plain_length(tensors);
  if (n < 1) Py_RETURN_NONE;
  Words addresses, forms;
  try {
    addresses.reserve(n);
    // As much as matrices need.
    forms.reserve(n * 7);
    for (Py_ssize_t i = 0; i < n; i++) {
      TensorImpl* impl = impl_of(tensors, i);
      if (of_gradients) {
        // These headers only declare at::Tensor, whose one base is TensorBase.
        const auto& grad = reinterpret_cast<const at::TensorBase&>(impl->grad());
        if (!grad.defined()) Py_RETURN_NONE;
        impl = grad.unsafeGetTensorImpl();
      }
      if (!append_layout(impl, addresses, forms)) Py_RETURN_NONE;
    }
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
  const auto bytes = [](const Words& words) { return reinterpret_cast<const char*>(words.data()); };
  const auto size = [](const Words& words) { return static_cast<Py_ssize_t>(words.size() * sizeof(int64_t)); };
  return Py_BuildValue("y#y#", bytes(addresses), size(addresses), bytes(forms), size(forms));
}

PyObject* layout(PyObject*, PyObject* tensors) {
  return layout_of(tensors, false);
}

PyObject* grad_layout(PyObject*, PyObject* tensors) {
  return layout_of(tensors, true);
}

// As plain_length, or -1 if a tensor has no version.
Py_ssize_t versioned_length(PyObject* tensors) {
  const Py_ssize_t n = plain_length(tensors);
  for (Py_ssize_t i = 0; i < n; i++)
    if (impl_of(tensors, i)->is_inference()) return -1;
  return n;
}

PyObject* version_sum(PyObject*, PyObject* tensors) {
  const Py_ssize_t n = versioned_length(tensors);
  if (n < 0) Py_RETURN_NONE;
  int64_t sum = 0;
  for (Py_ssize_t i = 0; i < n; i++) sum += impl_of(tensors, i)->version_counter().current_version();
  return PyLong_FromLongLong(sum);
}

PyObject* increment_versions(PyObject*, PyObject* tensors) {
  const Py_ssize_t n = versioned_length(tensors);
  if (n < 0) Py_RETURN_NONE;
  for (Py_ssize_t i = 0; i < n; i++) impl_of(tensors, i)->bump_version();
  Py_RETURN_TRUE;
}

PyObject* flatten(PyObject*, PyObject* entries) {
  PyObject *key, *entry, *name, *value, *flat = PyList_New(0);
  Py_ssize_t i = 0;
  while (flat && PyDict_Check(entries) && PyDict_Next(entries, &i, &key, &entry)) {
    bool failed = PyList_Append(flat, key) || PyList_Append(flat, entry);
    Py_ssize_t j = 0;
    while (!failed && PyDict_Check(entry) && PyDict_Next(entry, &j, &name, &value))
      failed = PyList_Append(flat, name) || PyList_Append(flat, value);
    if (failed) Py_CLEAR(flat);
  }
  return flat;
}

PyObject* is_flattened(PyObject*, PyObject* args) {
  PyObject *entries, *flat, *key, *entry, *name, *value;
  if (!PyArg_ParseTuple(args, "O!O!", &PyDict_Type, &entries, &PyList_Type, &flat)) return nullptr;
  const Py_ssize_t n = PyList_GET_SIZE(flat);
  Py_ssize_t i = 0, k = 0;
  const auto next_two_are = [&](PyObject* a, PyObject* b) {
    k += 2;
    return k <= n && PyList_GET_ITEM(flat, k - 2) == a && PyList_GET_ITEM(flat, k - 1) == b;
  };
  while (PyDict_Next(entries, &i, &key, &entry)) {
    if (!next_two_are(key, entry)) Py_RETURN_FALSE;
    Py_ssize_t j = 0;
    while (PyDict_Check(entry) && PyDict_Next(entry, &j, &name, &value))
      if (!next_two_are(name, value)) Py_RETURN_FALSE;
  }
  return PyBool_FromLong(k == n);
}

PyMethodDef methods[] = {
    {"connect", connect, METH_VARARGS, nullptr},
    {"layout", layout, METH_O, nullptr},
    {"grad_layout", grad_layout, METH_O, nullptr},
    {"version_sum", version_sum, METH_O, nullptr},
    {"increment_versions", increment_versions, METH_O, nullptr},
    {"flatten", flatten, METH_O, nullptr},
    {"is_flattened", is_flattened, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "tensor_lists", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit_tensor_lists() {
  return PyModule_Create(&definition);
}

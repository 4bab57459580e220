#include "tests/oracle/oracle.h"

namespace flashoptim::oracle {

const std::vector<std::string>& names() {
  static const std::vector<std::string> list{"AdamW", "Adam", "Sgd", "Sgdw", "SgdPlain", "SgdwPlain", "Lion"};
  return list;
}

}  // namespace flashoptim::oracle

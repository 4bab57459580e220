#include "flashoptim/offload.h"

#include <algorithm>
#include <string>
#include <utility>

#include "src/checks.h"

namespace flashoptim {

Status OffloadRing::make(OffloadDevice* device, void* memory, int64_t slot_bytes, int64_t slots, OffloadRing* ring) {
  return guarded([&] {
    if (device == nullptr || ring == nullptr) return Status::invalid_argument("device or ring is null");
    if (memory == nullptr || slot_bytes < 1 || slots < 2) {
      return Status::invalid_argument("a ring of slots = " + std::to_string(slots) + " of slot_bytes = " +
                                      std::to_string(slot_bytes) + "; needed are at least 2 slots of at least 1 byte");
    }
    OffloadRing made;
    made.device_ = device;
    made.memory_ = static_cast<char*>(memory);
    made.slot_bytes_ = slot_bytes;
    made.slots_.resize(static_cast<size_t>(slots));
    for (int64_t s = 0; s < slots; ++s) {
      Slot& slot = made.slots_[static_cast<size_t>(s)];
      for (int64_t* event : {&slot.up, &slot.stepped, &slot.down}) {
        const Status status = device->make_event(event);
        if (!status.is_ok()) return status;
      }
      made.free_.push_back(s);
    }
    Status status = device->make_event(&made.up_over_);
    if (!status.is_ok()) return status;
    // The memory may still be in use by what the step queue was given before.
    status = device->record(made.slots_[0].stepped, OffloadQueue::kStep);
    if (status.is_ok()) status = device->wait(OffloadQueue::kUp, made.slots_[0].stepped);
    if (status.is_ok()) *ring = std::move(made);
    return status;
  });
}

int64_t OffloadRing::add(std::vector<OffloadCopy> copies, int64_t parts) {
  Unit unit;
  unit.copies = std::move(copies);
  unit.seen.assign(static_cast<size_t>(parts), false);
  unit.expected = parts;
  const auto number = static_cast<int64_t>(units_.size());
  unit.next = number > 0 ? number - 1 : 0;
  units_.push_back(std::move(unit));
  if (!units_[0].has_learned) units_[0].next = number;
  return number;
}

void OffloadRing::expect(const std::vector<int64_t>& units) {
  for (size_t i = 0; i < units.size(); ++i) {
    Unit& unit = units_[static_cast<size_t>(units[i])];
    if (!unit.has_learned) unit.next = units[(i + 1) % units.size()];
  }
}

Status OffloadRing::open(int64_t number, void** slot) {
  return guarded([&] {
    Unit& unit = units_.at(static_cast<size_t>(number));
    unit.slot >= 0 ? ++counts_.prefetched : ++counts_.fetched;
    if (unit.slot < 0) {
      int64_t free = -1;
      Status status = acquire(number, &free);
      if (status.is_ok()) status = upload(number, free);
      if (!status.is_ok()) return status;
    }
    if (last_ >= 0 && last_ != number) {
      Unit& before = units_[static_cast<size_t>(last_)];
      before.next = number;
      before.has_learned = true;
    }
    last_ = open_ = number;
    Slot& held = slots_[static_cast<size_t>(unit.slot)];
    held.last_use = ++uses_;
    // A unit that could not be brought up ahead is brought up when it is opened, and its failure is told then.
    static_cast<void>(prefetch(number));
    Status status = device_->wait(OffloadQueue::kStep, held.up);
    if (status.is_ok() && unit.is_dirty && held.stream != device_->step_stream()) {
      status = mark(held);
      if (status.is_ok()) status = device_->wait(OffloadQueue::kStep, held.stepped);
    }
    if (!status.is_ok()) {
      open_ = -1;
      return status;
    }
    *slot = address(unit.slot);
    return status;
  });
}

Status OffloadRing::close(int64_t number, int64_t part) {
  return guarded([&] {
    Unit& unit = units_.at(static_cast<size_t>(number));
    Slot& slot = slots_[static_cast<size_t>(unit.slot)];
    open_ = -1;
    unit.is_dirty = true;
    in_flight_ = true;
    slot.is_marked = false;
    slot.stream = device_->step_stream();
    const auto parts = static_cast<int64_t>(unit.seen.size());
    if (part < 0) {
      unit.count = parts;
      unit.expected = std::min(unit.expected, parts);
      std::fill(unit.seen.begin(), unit.seen.end(), true);
    } else {
      if (unit.seen[static_cast<size_t>(part)]) {  // the next pass has begun
        unit.expected = unit.count;
        unit.count = 0;
        std::fill(unit.seen.begin(), unit.seen.end(), false);
      }
      unit.seen[static_cast<size_t>(part)] = true;
      ++unit.count;
    }
    Status status = mark(slot);
    if (status.is_ok() && unit.count >= unit.expected) status = download(number);
    if (status.is_ok()) static_cast<void>(prefetch(number));
    return status;
  });
}

void OffloadRing::cancel(int64_t unit) {
  if (open_ == unit) open_ = -1;
}

Status OffloadRing::mark(Slot& slot) {
  if (slot.is_marked) return Status::ok();
  const Status status = device_->record(slot.stepped, OffloadQueue::kStep);
  slot.is_marked = status.is_ok();
  return status;
}

Status OffloadRing::upload(int64_t number, int64_t place) {
  Unit& unit = units_[static_cast<size_t>(number)];
  Slot& slot = slots_[static_cast<size_t>(place)];
  Status status;
  if (slot.has_down) status = device_->wait(OffloadQueue::kUp, slot.down);
  if (status.is_ok() && slot.is_marked) status = device_->wait(OffloadQueue::kUp, slot.stepped);  // dropped
  if (status.is_ok() && unit.home_slot >= 0 && unit.home_slot != place) {
    status = device_->wait(OffloadQueue::kUp, slots_[static_cast<size_t>(unit.home_slot)].down);
  }
  up_in_flight_ = true;
  for (size_t i = 0; status.is_ok() && i < unit.copies.size(); ++i) {
    const OffloadCopy& copy = unit.copies[i];
    status = device_->copy_up(address(place) + copy.offset, copy.host, copy.bytes);
    counts_.up_bytes += copy.bytes;
    ++counts_.up_copies;
  }
  if (status.is_ok()) status = device_->record(slot.up, OffloadQueue::kUp);
  if (!status.is_ok()) {
    free_.push_front(place);
    return status;
  }
  slot.unit = number;
  slot.is_marked = false;
  slot.last_use = ++uses_;
  unit.slot = place;
  return status;
}

Status OffloadRing::download(int64_t number) {
  Unit& unit = units_[static_cast<size_t>(number)];
  const int64_t place = unit.slot;
  Slot& slot = slots_[static_cast<size_t>(place)];
  Status status = mark(slot);
  if (status.is_ok()) status = device_->wait(OffloadQueue::kDown, slot.stepped);
  for (size_t i = 0; status.is_ok() && i < unit.copies.size(); ++i) {
    const OffloadCopy& copy = unit.copies[i];
    status = device_->copy_down(copy.host, address(place) + copy.offset, copy.bytes);
    counts_.down_bytes += copy.bytes;
    ++counts_.down_copies;
  }
  if (status.is_ok()) status = device_->record(slot.down, OffloadQueue::kDown);
  if (!status.is_ok()) return status;
  slot.has_down = true;
  slot.is_marked = false;
  last_down_ = slot.down;
  unit.home_slot = place;
  unit.is_dirty = false;
  release(place);
  return status;
}

void OffloadRing::release(int64_t place) {
  Slot& slot = slots_[static_cast<size_t>(place)];
  units_[static_cast<size_t>(slot.unit)].slot = -1;
  slot.unit = -1;
  free_.push_back(place);
}

Status OffloadRing::acquire(int64_t number, int64_t* slot) {
  if (free_.empty()) {
    int64_t victim = stale_slot(number);
    if (victim < 0) {
      // Of those that are used next, the last; of those that have been stepped in part, the one that waits longest.
      for (int64_t unit = units_[static_cast<size_t>(number)].next, i = 0; unit >= 0 && i < units();
           unit = units_[static_cast<size_t>(unit)].next, ++i) {
        const Unit& one = units_[static_cast<size_t>(unit)];
        if (one.slot >= 0 && !one.is_dirty && unit != open_) victim = one.slot;
      }
    }
    if (victim >= 0) {
      release(victim);
    } else {
      const auto oldest = std::min_element(slots_.begin(), slots_.end(),
                                           [](const Slot& a, const Slot& b) { return a.last_use < b.last_use; });
      const Status status = download(oldest->unit);
      if (!status.is_ok()) return status;
    }
  }
  *slot = free_.front();
  free_.pop_front();
  return Status::ok();
}

int64_t OffloadRing::stale_slot(int64_t from) const {
  std::vector<bool> is_near(slots_.size(), false);
  int64_t unit = from;
  for (size_t i = 0; i <= slots_.size() && unit >= 0; ++i) {
    const Unit& one = units_[static_cast<size_t>(unit)];
    if (one.slot >= 0) is_near[static_cast<size_t>(one.slot)] = true;
    unit = one.next;
  }
  int64_t found = -1;
  for (size_t s = 0; s < slots_.size(); ++s) {
    const Slot& slot = slots_[s];
    if (slot.unit < 0 || is_near[s] || slot.unit == open_ || units_[static_cast<size_t>(slot.unit)].is_dirty) continue;
    if (found < 0 || slot.last_use < slots_[static_cast<size_t>(found)].last_use) found = static_cast<int64_t>(s);
  }
  return found;
}

Status OffloadRing::prefetch(int64_t from) {
  int64_t next = units_[static_cast<size_t>(from)].next;
  for (size_t i = 0; i + 1 < slots_.size() && next >= 0 && next != from; ++i) {
    Unit& unit = units_[static_cast<size_t>(next)];
    if (unit.slot < 0) {
      if (free_.empty()) {
        const int64_t stale = stale_slot(from);
        if (stale < 0) return Status::ok();
        release(stale);
      }
      const int64_t slot = free_.front();
      free_.pop_front();
      const Status status = upload(next, slot);
      if (!status.is_ok()) return status;
    }
    next = unit.next;
  }
  return Status::ok();
}

Status OffloadRing::flush() {
  return guarded([&] {
    Status result;
    for (int64_t u = 0; u < units(); ++u) {
      Unit& unit = units_[static_cast<size_t>(u)];
      if (unit.count > 0) {
        unit.expected = unit.count;
        unit.count = 0;
        std::fill(unit.seen.begin(), unit.seen.end(), false);
      }
      if (!unit.is_dirty) continue;
      const Status status = download(u);
      if (result.is_ok()) result = status;
    }
    return result;
  });
}

Status OffloadRing::synchronize() {
  const Status flushed = flush();
  Status status;
  if (up_in_flight_) {  // what was brought up ahead, and nobody has waited for
    status = device_->record(up_over_, OffloadQueue::kUp);
    if (status.is_ok()) status = device_->synchronize(up_over_);
    up_in_flight_ = !status.is_ok();
  }
  if (!flushed.is_ok()) return flushed;
  if (!status.is_ok() || !in_flight_) return status;
  if (last_down_ >= 0) status = device_->synchronize(last_down_);
  if (!status.is_ok()) return status;
  for (Unit& unit : units_) unit.home_slot = -1;
  in_flight_ = false;
  return status;
}

void OffloadRing::drop_all() {
  for (int64_t u = 0; u < units(); ++u) drop(u);
}

void OffloadRing::drop(int64_t number) {
  Unit& unit = units_[static_cast<size_t>(number)];
  if (unit.slot < 0 || number == open_) return;
  // A step that is under way must be over before another unit comes to its place.
  if (unit.is_dirty && !mark(slots_[static_cast<size_t>(unit.slot)]).is_ok()) return;
  unit.is_dirty = false;
  release(unit.slot);
}

}  // namespace flashoptim

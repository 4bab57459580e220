// Places of shards: what a box's place and rows are, and which cuts quantized states take.
#include <gtest/gtest.h>

#include <set>

#include "tests/kernels/shards.h"

namespace flashoptim::test {
namespace {

constexpr RowRule kFirst = RowRule::kFirstDimension, kShortest = RowRule::kShortest;

TEST(Place, RowsAreTheShortestTrailingRunOfDimensionsWithThirtyTwoElements) {
  struct Shape {
    std::vector<int64_t> sizes;
    GroupLayout first, shortest;
  };
  const Shape shapes[] = {
      {{}, {1, 1}, {1, 1}},
      {{1000}, {1, 1000}, {1, 1000}},
      {{100, 31}, {1, 3100}, {1, 3100}},
      {{7, 32}, {7, 32}, {7, 32}},
      {{0, 64}, {0, 0}, {0, 0}},
      {{64, 0}, {0, 0}, {0, 0}},
      {{64, 48, 3, 3}, {64, 432}, {64, 432}},
      {{64, 3, 7, 7}, {64, 147}, {192, 49}},
      {{8, 14336, 4096}, {8, 14336 * 4096}, {8 * 14336, 4096}},
      {{4, 6, 16}, {4, 96}, {4, 96}},
      {{1, 64, 48}, {1, 3072}, {64, 48}},
      {{64, 5, 2, 3}, {1, 1920}, {1, 1920}},
      {{64, 1, 40}, {64, 40}, {64, 40}},
      {{int64_t{1} << 20, int64_t{1} << 20},
       {int64_t{1} << 20, int64_t{1} << 20},
       {int64_t{1} << 20, int64_t{1} << 20}},
  };
  for (const Shape& s : shapes) {
    const int64_t dimensions = static_cast<int64_t>(s.sizes.size());
    SCOPED_TRACE(::testing::PrintToString(s.sizes));
    EXPECT_TRUE(group_layout(s.sizes.data(), dimensions) == s.first);
    EXPECT_TRUE(group_layout(s.sizes.data(), dimensions, kFirst) == s.first);
    EXPECT_TRUE(group_layout(s.sizes.data(), dimensions, kShortest) == s.shortest);
  }
}

TEST(Place, ABoxIsTheElementsThatItsPlaceSays) {
  Random random(11);
  int64_t boxes = 0, refused = 0;
  for (int round = 0; round < 20000; ++round) {
    const int64_t dimensions = static_cast<int64_t>(random.below(5));
    std::vector<int64_t> whole(static_cast<size_t>(dimensions)), offsets = whole, sizes = whole;
    int64_t numel = 1;
    size_t cuts = 0;
    for (size_t d = 0; d < whole.size(); ++d) {
      whole[d] = 1 + static_cast<int64_t>(random.below(9));
      sizes[d] = whole[d];
      if (random.below(2) == 0) {
        offsets[d] = static_cast<int64_t>(random.below(static_cast<uint64_t>(whole[d])));
        sizes[d] = static_cast<int64_t>(random.below(static_cast<uint64_t>(whole[d] - offsets[d]) + 1));
      }
      cuts += sizes[d] != whole[d];
      numel *= sizes[d];
    }
    SCOPED_TRACE(::testing::PrintToString(whole) + ::testing::PrintToString(offsets) + ::testing::PrintToString(sizes));
    const RowRule rule = random.below(2) == 0 ? kFirst : kShortest;
    Place place;
    place.first_element = 77;
    const Status status = place_of_box(whole.data(), offsets.data(), sizes.data(), dimensions, rule, &place);
    if (!status.is_ok()) {
      ++refused;
      ASSERT_EQ(status.code(), StatusCode::kUnsupported) << status.message();
      ASSERT_GE(cuts, 2u);
      ASSERT_EQ(place.first_element, 77) << "it must stay as it was";
      continue;
    }
    ++boxes;
    ASSERT_TRUE(place.whole == group_layout(whole.data(), dimensions, rule));
    ASSERT_EQ(shard_layout(place, numel).numel(), numel);
    for (int64_t i = 0; i < numel; ++i) {
      int64_t rest = i, stride = 1, element = 0;
      for (size_t d = whole.size(); d-- > 0;) {
        element += (offsets[d] + rest % sizes[d]) * stride;
        rest /= sizes[d];
        stride *= whole[d];
      }
      ASSERT_EQ(whole_element(place, i), element) << "element " << i;
    }
  }
  EXPECT_GT(boxes, 10000);
  EXPECT_GT(refused, 100);
}

TEST(Place, BoxesThatHaveNoPlaceAreErrorsThatNameTheDimensionAndTheValue) {
  const int64_t whole[] = {4, 6, 64};
  Place place;
  const auto expect = [&](const int64_t(&offsets)[3], const int64_t(&sizes)[3], StatusCode code,
                          std::initializer_list<const char*> parts) {
    const Status status = place_of_box(whole, offsets, sizes, 3, kFirst, &place);
    EXPECT_EQ(status.code(), code);
    for (const char* part : parts) EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
  };
  expect({0, -1, 0}, {4, 2, 64}, StatusCode::kInvalidArgument, {"offsets[1] = -1"});
  expect({0, 5, 0}, {4, 2, 64}, StatusCode::kInvalidArgument, {"offsets[1] = 5", "sizes[1] = 2", "whole_sizes[1] = 6"});
  expect({0, 0, 0}, {4, 6, -3}, StatusCode::kInvalidArgument, {"sizes[2] = -3"});
  expect({0, 0, 0}, {4, 3, 32}, StatusCode::kUnsupported, {"sizes[1] = 3 of 6", "sizes[2] = 32 of 64"});
  EXPECT_TRUE(place == Place{});
}

/// Whether every group of the layout is all of a group of the whole, element by element.
bool holds_whole_groups(const GroupLayout& layout, const Place& place) {
  for (int64_t begin = 0, numel = layout.numel(); begin < numel;) {
    int64_t end = begin + 1;
    const int64_t group = group_of_element(layout, begin);
    while (end < numel && group_of_element(layout, end) == group) ++end;
    const int64_t first = whole_element(place, begin), whole_group = group_of_element(place.whole, first);
    for (int64_t i = begin; i < end; ++i) {
      if (whole_element(place, i) != first + (i - begin)) return false;
      if (group_of_element(place.whole, first + (i - begin)) != whole_group) return false;
    }
    const int64_t next = first + (end - begin);
    if (first > 0 && group_of_element(place.whole, first - 1) == whole_group) return false;
    if (next < place.whole.numel() && group_of_element(place.whole, next) == whole_group) return false;
    begin = end;
  }
  return true;
}

Status make_plan(StateCodec codec, const Place& place, const GroupLayout& layout) {
  ParameterTensors t;
  t.parameter = far_apart(1);
  for (int k = 0; k < 2; ++k) t.states[k] = far_apart(2 + k), t.scales[k] = far_apart(4 + k);
  t.state_codec = codec;
  t.layout = layout;
  t.place = place;
  Plan plan;
  return Plan::make(OptimizerKind::kAdamW, true, &t, 1, &plan);
}

TEST(Place, QuantizedStatesAreTakenWhereNoGroupIsCutAndOnlyThere) {
  Random random(12);
  const int64_t rows[] = {32, 33, 40, 64, 72, 96, 100, 160};
  int64_t taken = 0, refused = 0;
  const auto multiple = [&random](int64_t of, int64_t most) {
    return of * static_cast<int64_t>(random.below(static_cast<uint64_t>(most / of) + 1));
  };
  for (int round = 0; round < 200000; ++round) {
    const int64_t row = rows[random.below(std::size(rows))];
    GroupLayout whole{1 + static_cast<int64_t>(random.below(12)), row};
    if (random.below(4) == 0) whole = {1, whole.numel()};
    const int64_t step = random.below(3) == 0 ? 1 : random.below(2) == 0 ? 8 : 32;
    Place place;
    place.whole = whole;
    int64_t numel;
    if (random.below(2) == 0) {
      const int64_t runs = 1 + static_cast<int64_t>(random.below(6));
      place.run = random.below(4) == 0 ? row * (1 + static_cast<int64_t>(random.below(2))) : 1 + multiple(step, row);
      if (place.run > 1 && random.below(8) != 0) --place.run;
      if (place.run == 0) place.run = row;
      place.stride =
          random.below(4) == 0 ? place.run + multiple(step, row) : row * (1 + static_cast<int64_t>(random.below(3)));
      place.first_element = random.below(3) == 0 ? row - place.run : multiple(step, whole.numel());
      numel = runs * place.run;
    } else {
      place.first_element = random.below(2) == 0 ? multiple(row, whole.numel()) : multiple(step, whole.numel());
      const int64_t left = whole.numel() - place.first_element;
      numel = random.below(3) == 0 ? left : random.below(2) == 0 ? multiple(row, left) : multiple(step, left);
    }
    const int64_t runs = place.run > 0 ? numel / place.run : 1;
    const bool inside = place.first_element >= 0 && (place.run == 0 || runs == 1 || place.stride >= place.run) &&
                        (numel == 0 || whole_element(place, numel - 1) < whole.numel());
    if (!inside || numel == 0) continue;
    GroupLayout layout = shard_layout(place, numel);
    if (random.below(8) == 0) layout = {1, numel};
    SCOPED_TRACE(::testing::PrintToString(std::vector<int64_t>{whole.rows, whole.row_size, place.first_element,
                                                               place.run, place.stride, layout.rows, layout.row_size}));
    ASSERT_EQ(layout.numel(), numel);
    const bool expected = holds_whole_groups(layout, place);
    const Status status = make_plan(StateCodec::kDefault, place, layout);
    ASSERT_EQ(status.is_ok(), expected) << status.message();
    ASSERT_TRUE(make_plan(StateCodec::kFloat32, place, layout).is_ok());
    ++(expected ? taken : refused);
  }
  EXPECT_GT(taken, 5000);
  EXPECT_GT(refused, 5000);
}

TEST(Place, ACutWithinAGroupNamesThePlaceAndTheRemedy) {
  const Cut cut = flat_cut({1, 100}, 40, 100);
  const Status status = make_plan(StateCodec::kPaper, cut.place, cut.layout);
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  for (const char* part : {"tensors[0].place", "first_element = 40", "1 x 100", "multiples of 32", "kFloat32"})
    EXPECT_NE(status.message().find(part), std::string::npos) << status.message();
}

TEST(Place, PlacesThatDoNotFitAreErrorsThatNameTheFieldAndTheValue) {
  struct Bad {
    const char* text;
    void (*spoil)(Place&);
  };
  const Bad cases[] = {
      {"place.first_element = -5", [](Place& p) { p.first_element = -5; }},
      {".first_element = 97", [](Place& p) { p.first_element = 97; }},
      {"place.run = -1", [](Place& p) { p.run = -1; }},
      {"place.run = 48", [](Place& p) { p.run = 48; }},
      {"place.run = 32 without whole", [](Place& p) { p.whole = {}; }},
      {"place.stride = 31", [](Place& p) { p.stride = 31; }},
      {"stride = 129", [](Place& p) { p.stride = 129; }},
      {"rows = -2", [](Place& p) { p.whole.rows = -2; }},
      {"2^57", [](Place& p) { p.whole = {int64_t{1} << 40, int64_t{1} << 40}; }},
  };
  Place good;
  good.whole = {4, 96};
  good.run = 32;
  good.stride = 96;
  ASSERT_TRUE(make_plan(StateCodec::kDefault, good, {4, 32}).is_ok());
  for (const Bad& bad : cases) {
    Place place = good;
    bad.spoil(place);
    const Status status = make_plan(StateCodec::kFloat32, place, {4, 32});
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << bad.text;
    EXPECT_NE(status.message().find("tensors[0].place"), std::string::npos) << status.message();
    EXPECT_NE(status.message().find(bad.text), std::string::npos) << status.message();
  }
}

}  // namespace
}  // namespace flashoptim::test

// What each fused scoring kernel computes of a network, and where everything lies in shared memory.
//
// Plain C++ without a device, as fused_index.h.
#pragma once

#include <type_traits>

#include "fused_index.h"

namespace fastalps::cuda::fused {

// Kernel E: the first two convolutions of encoder and distorter.
template <int kSize_, int kFirst_, int kSecond_>
struct EncodeShape {
  static constexpr int kSize = kSize_, kFirst = kFirst_, kSecond = kSecond_;
  static constexpr int kHalf = divide_up(kSize, 2), kQuarter = divide_up(kHalf, 2);
  static constexpr int kBordered = kSize + 2;
  static_assert(kHalf <= kTileRows && kQuarter <= 8 && kBordered <= 32);
  // Both networks side by side: they share the image. The second convolution reads every other
  // column: a row has its odd ones first, from -1 on, then the even ones.
  static constexpr int kOdd = 9, kRow = kOdd + 8;
  // Rows for 8 rows of outputs, even where there are less: groups of warps compute all.
  static constexpr int kRows = 2 * 8 + 1;
  static_assert(kHalf + 2 <= kRows);
  using FirstMap = Planes<kRows * kRow>;
  FASTALPS_INDEX static int cell(int row, int column) {
    return (row + 1) * kRow + (column & 1 ? (column + 1) / 2 : kOdd + column / 2);
  }
  // From the cell of an output, see `second_convolution`, to a tap's.
  FASTALPS_INDEX static int tap_cell(int tap) {
    return tap / 3 * kRow + (tap % 3 == 1 ? kOdd : tap % 3 / 2);
  }
  static constexpr int kFirstColumns = 2 * kFirst / kTileColumns;
  static constexpr int kFirstFragments = fragments(9, 1, 2 * kFirst);
  // Of one network: two groups of columns.
  static constexpr int kTilesDown = 2, kTilesAcross = kSecond / kTileColumns / 2;
  static constexpr int kSecondGroups = 2, kSecondColumns = kSecond / kTileColumns;
  static constexpr int kSecondFragments = fragments(9, kFirst, kSecond);
  static constexpr int kFragments = kFirstFragments + 2 * kSecondFragments;
  static constexpr int kBiases = 2 * kFirst + 2 * kSecond;
  static constexpr int kOutputs = kQuarter * kQuarter * kSecond;  // Of one network.

  static_assert(kFirst % 16 == 0 && kSecond % 16 == 0);

  // Shared memory: weights, the first map, the bordered image, the second layer's biases, where two
  // patches are.
  static constexpr int kMapAt = kFragments * kLanes * 8;
  static constexpr int kImageAt = kMapAt + 2 * kFirst / kChunkChannels * FirstMap::kPlaneBytes;
  static constexpr int kBiasesAt = align_up(kImageAt + kBordered * kBordered * 2, kChunkBytes);
  static constexpr int kPatchesAt = kBiasesAt + 2 * kSecond * 4;
  static constexpr int kSharedBytes = kPatchesAt + 2 * kChunkBytes;
};

// A convolution of stride 2 and padding 1 on pixels that are whole tiles of patches, as a warp does
// it: kRows_ rows of kCells_ results of kTiles_ tiles, kAcross_ columns of 8 outputs. Terms come in
// kSteps_ steps, and kDepth_ of them at a time from L2.
template <int kTiles_, int kTileBytes_, int kRows_, int kCells_, int kSide_, int kPixelBytes_,
          int kSteps_, int kAcross_, int kDepth_>
struct Strided {
  static constexpr int kTiles = kTiles_, kTileBytes = kTileBytes_;
  static constexpr int kRows = kRows_, kCells = kCells_;
  static constexpr int kSide = kSide_, kPixelBytes = kPixelBytes_;  // Of the inputs.
  static constexpr int kSteps = kSteps_, kAcross = kAcross_, kDepth = kDepth_;
  static_assert(kSteps % kDepth == 0 && (kSide == 2 * kCells || kSide == 2 * kCells - 1));
  using Sums = float[kRows][kTiles][kCells][kAcross][4];
};

// First half of kernel M: the third and fourth convolutions of one network, their pooling. A tile's
// 16 rows are patches, all at the same pixel, so that a tap is outside for all or none. A block has
// kTiles of them: as many patches meet a weight of the fourth convolution that was read from L2.
template <int kTiles_, int kSide_, int kSecond_, int kThird_, int kLatent_>
struct LatentShape {
  static constexpr int kTiles = kTiles_, kPatches = kTiles * kTileRows;
  static constexpr int kSide = kSide_, kSecond = kSecond_, kThird = kThird_, kLatent = kLatent_;
  static constexpr int kHalf = 4, kQuarter = 2;
  static_assert(divide_up(kSide, 2) == kHalf);
  static_assert(kSecond % 16 == 0 && kThird % 16 == 0 && kLatent % 16 == 0);
  using StagedMap = Map<kSecond>;
  using HiddenMap = Map<kThird>;
  static constexpr int kThirdFragments = fragments(9, kSecond, kThird);  // Of one network.
  static constexpr int kFourthFragments = fragments(9, kThird, kLatent);
  static constexpr int kFragments = 2 * (kThirdFragments + kFourthFragments);
  static constexpr int kBiases = 2 * kThird + 2 * kLatent;

  // Two rows of results a band, for which five rows of inputs are staged, of one tile at a time.
  static constexpr int kBands = 2, kBandRows = kHalf / kBands, kStagedRows = 2 * kBandRows + 1;
  // Chunks of a row of a patch, and of how many patches (a part of a tile) a block copies them.
  static constexpr int kRowChunks = kSide * StagedMap::kChunks;
  static constexpr int kAtOnce = largest_power(kBlock / kRowChunks, kTileRows);
  // Warps share out a band's rows and the columns.
  static constexpr int kThirdGroups = kWarps / kBandRows;
  static constexpr int kThirdAcross = kThird / kTileColumns / kThirdGroups;
  static_assert(kThirdAcross * kTileColumns * kThirdGroups == kThird);
  // Warps share out the latent's columns, and, where those are few, also the terms of their sums.
  static constexpr int kColumns = kLatent / kTileColumns;
  static constexpr int kFourthAcross = kColumns >= kWarps ? kColumns / kWarps : 1;
  static constexpr int kGroups = kColumns / kFourthAcross;
  static constexpr int kSlices = kWarps / kGroups;
  static_assert(kGroups * kSlices == kWarps && kThird / kTileTerms % kSlices == 0);

  static constexpr int kThirdSteps = kSecond / kTileTerms;
  using ThirdConvolution = Strided<1, 0, 1, kHalf, kSide, StagedMap::bytes(kTileRows), kThirdSteps,
                                   kThirdAcross, kThirdSteps % 4 == 0 && kThirdAcross <= 4 ? 2 : 1>;
  using FourthConvolution =
      Strided<kTiles, HiddenMap::bytes(kHalf * kHalf * kTileRows), kQuarter, kQuarter, kHalf,
              HiddenMap::bytes(kTileRows), kThird / kTileTerms / kSlices, kFourthAcross, 1>;

  // Shared memory: staged rows (later the slices' sums), the tiles' hidden maps.
  static constexpr int kRowBytes = StagedMap::bytes(kStagedRows * kSide * kTileRows);
  static constexpr int kPartBytes = kSlices * kPatches * kLatent * 4;
  static constexpr int kHiddenAt = kRowBytes > kPartBytes ? kRowBytes : kPartBytes;
  static constexpr int kHiddenBytes = HiddenMap::bytes(kHalf * kHalf * kTileRows);  // Of a tile.
  static constexpr int kSharedBytes = kHiddenAt + kTiles * kHiddenBytes;
};

// Between the halves of kernel M: the perturbation and the dense layer. Rows are decoder passes; a
// block has kTiles tiles of them and some of the columns. Its results lie kRowValues apart.
template <int kTiles_, int kLatent_, int kStart_, int kRowValues_>
struct DenseShape {
  static constexpr int kTiles = kTiles_, kRows = kTiles * kTileRows;
  static constexpr int kLatent = kLatent_, kStart = kStart_, kRowValues = kRowValues_;
  static constexpr int kQuarter = 2;
  static_assert(kLatent % 16 == 0 && kStart % 16 == 0);
  using LatentMap = Map<kLatent>;
  static constexpr int kOutputs = kQuarter * kQuarter * kStart;  // By pixel, then channel.
  static constexpr int kFragments = fragments(1, kLatent, kOutputs);
  static constexpr int kBiases = kOutputs;
  static constexpr int kColumns = kOutputs / kTileColumns;
  static constexpr int kAcross = 4;                                     // Of a warp.
  static constexpr int kGroups = divide_up(kColumns, kAcross* kWarps);  // Blocks for all columns.
  static_assert(kColumns % kAcross == 0);
  static constexpr int kSteps = kLatent / kTileTerms;
  static constexpr int kDepth = kSteps % 4 == 0 ? 4 : kSteps % 2 == 0 ? 2 : 1;

  // Shared memory: latents, the perturbations' factors.
  static constexpr int kFactorsAt = LatentMap::bytes(kRows);
  static constexpr int kSharedBytes = kFactorsAt + kRows * 4;
};

// Second half of kernel M: the first two transposed convolutions. Rows are decoder passes; a tile
// has 16 of them at the same pixel, a block kTiles.
template <int kTiles_, int kSide_, int kStart_, int kFirst_, int kSecond_>
struct ExpandShape {
  static constexpr int kTiles = kTiles_, kRows = kTiles * kTileRows;
  static constexpr int kSide = kSide_, kStart = kStart_;
  static constexpr int kFirst = kFirst_, kSecond = kSecond_;
  static constexpr int kQuarter = 2, kHalf = 4;
  static_assert(divide_up(kSide, 2) == kHalf);
  static_assert(kStart % 16 == 0 && kFirst % 16 == 0 && kSecond % 8 == 0);
  using StartMap = Map<kStart>;
  using FirstMap = Map<kFirst>;
  static constexpr int kFirstFragments = fragments(9, kStart, kFirst);
  static constexpr int kSecondFragments = fragments(9, kFirst, kSecond);
  static constexpr int kFragments = kFirstFragments + kSecondFragments;
  static constexpr int kBiases = kFirst + kSecond;
  static constexpr int kOutputs = kSide * kSide * kSecond;
  // A row's inputs lie where its outputs will.
  static constexpr int kInputs = kQuarter * kQuarter * kStart;
  static_assert(kInputs <= kOutputs);

  // A warp's columns; its sums are at most 128 registers a lane.
  static constexpr int kFirstColumns = kFirst / kTileColumns;
  static constexpr int kFirstAcross = 1;
  static constexpr int kSecondAcross = kSecond / kTileColumns >= 8 ? 2 : 1;
  static constexpr int kSecondGroups = kSecond / kTileColumns / kSecondAcross;
  static_assert(kFirstColumns % (kFirstAcross * kWarps) == 0);

  // Shared memory: the dense layer's map, the first layer's map.
  static constexpr int kFirstAt = StartMap::bytes(kQuarter * kQuarter * kRows);
  static constexpr int kSharedBytes = kFirstAt + FirstMap::bytes(kHalf * kHalf * kRows);
};

// Rows that kParts warps share out: the first kFull of them have kMost, the others one less.
template <int kTotal, int kParts_>
struct Shares {
  static constexpr int kParts = kParts_, kMost = divide_up(kTotal, kParts);
  static constexpr int kFull = kTotal - kParts * (kMost - 1);
  static_assert(kMost > 1);
  FASTALPS_INDEX static bool full(int part) { return kFull == kParts || part < kFull; }
  FASTALPS_INDEX static int rows(int part) { return full(part) ? kMost : kMost - 1; }
  FASTALPS_INDEX static int first(int part) {
    return part * kMost - (full(part) ? 0 : part - kFull);
  }
  FASTALPS_INDEX static int part_of(int row) {
    return row < kFull * kMost ? row / kMost : kFull + (row - kFull * kMost) / (kMost - 1);
  }
};

// Kernel D: the last two transposed convolutions of stride 2, the two of stride 1, sigmoid, error.
//
// Each layer doubles the columns, and a tile's 16 rows are two runs of 8 that are results of one
// kind: so a map's columns lie by their remainders, of two after the third layer, of four after
// the fourth. Each run of operands and of stores is then 8 cells in a row, and a matrix of 8 pixels
// that was read once serves all the taps that meet it.
template <int kSize_, int kInputs_, int kThird_, int kFourth_, int kFifth_>
struct DecodeShape {
  static constexpr int kSize = kSize_, kInputs = kInputs_, kThird = kThird_;
  static constexpr int kFourth = kFourth_, kFifth = kFifth_;
  static constexpr int kHalf = divide_up(kSize, 2), kQuarter = divide_up(kHalf, 2);
  static_assert(kInputs % 16 == 0 && kThird % 16 == 0 && kFourth % 8 == 0 && kFifth % 8 == 0);
  // Runs of 8 anchors; behind the last result of a row there is a cell of zeros.
  static constexpr int kRun = 8;
  static_assert(kQuarter <= kRun && kHalf < 2 * kRun && kSize < 4 * kRun);

  // One column and one row of zeros behind, at least.
  static constexpr int kInputPitch = kRun + 1, kInputPixels = kQuarter * kQuarter;
  using InputMap = Planes<kInputPitch * kInputPitch>;
  // Even columns, then odd ones. What is outside is stored as zeros.
  static constexpr int kHalfPitch = 2 * kRun;
  using ThirdMap = Planes<2 * kRun * kHalfPitch>;
  FASTALPS_INDEX static int third_cell(int row, int column) {
    return row * kHalfPitch + column % 2 * kRun + column / 2;
  }
  // Columns by their remainders of four, and before those of 3 column -1, of zeros; so are the rows
  // before the first and behind the last.
  static constexpr int kPitch = 4 * kRun + 1;
  using FourthMap = Planes<(kSize + 2) * kPitch>;
  FASTALPS_INDEX static int kind_at(int remainder) {
    return remainder * kRun + (remainder == 3 ? 1 : 0);
  }
  FASTALPS_INDEX static int fourth_cell(int row, int column) {
    return (row + 1) * kPitch + kind_at(column % 4) + column / 4;
  }
  // The fifth layer's tiles have the columns of two remainders, 2 * `side` and the next. For its
  // three taps it needs four runs: from the column before the first kind to that after the second.
  // Their cells are 5 bits each of a word, which takes fewer instructions than to compute them.
  static constexpr int kRuns = (kind_at(3) - 1) | kind_at(0) << 5 | kind_at(1) << 10 |
                               kind_at(2) << 15 | kind_at(3) << 20 | (kind_at(0) + 1) << 25;
  FASTALPS_INDEX static int run_at(int side, int run) { return kRuns >> 5 * (2 * side + run) & 31; }

  // Of the third layer and the fourth each step's taps are together, see `ordered_tap`; two groups
  // of warps share out the third one's columns.
  static constexpr int kThirdFragments = fragments(9, kInputs, kThird);
  static constexpr int kFourthFragments = fragments(9, kThird, kFourth);
  // Of the fifth layer the three taps of a row are the terms of its steps.
  static constexpr int kFifthSteps = divide_up(3 * kFourth, kTileTerms);
  static constexpr int kFifthFragments = 3 * kFifthSteps * (kFifth / kTileColumns);
  // The last layer has one output, so the three taps of a row are the columns.
  static constexpr int kLastSteps = divide_up(kFifth, kTileTerms);
  static constexpr int kLastFragments = 3 * kLastSteps;
  static constexpr int kFragments =
      kThirdFragments + kFourthFragments + twins(kFifthFragments + kLastFragments);
  static constexpr int kBiases = kThird + kFourth + kFifth + kTileColumns;
  static constexpr int kInputValues = kInputPixels * kInputs;

  // What a warp computes: columns of eight outputs, and rows.
  static constexpr int kThirdColumns = kThird / kTileColumns, kThirdAcross = kThirdColumns / 2;
  static constexpr int kThirdDown = kThirdColumns >= 4 ? 2 : 1;  // Tiles.
  static constexpr int kThirdItems = kRun / 2 / kThirdDown * kThirdColumns;
  static constexpr int kFourthColumns = kFourth / kTileColumns;
  static constexpr int kFifthAcross = kFifth / kTileColumns;
  static_assert(kWarps % kFourthColumns == 0);
  using FourthShares = Shares<kHalf, kWarps / kFourthColumns>;
  using FifthShares = Shares<kSize, kWarps / 2>;

  // Floats of the last layer's products: a plane for each column of taps, in which a product lies
  // where the result is that it is a part of, so that reads are aligned, and stores by all lanes
  // meet all banks. On the edges there are products that nobody reads; those of the first plane's
  // last pixel and of the third one's first lie between the planes. Each strip of rows has one row
  // more on either side, for its neighbours.
  static constexpr int kStripRows = FifthShares::kMost + 2, kProductPitch = 4 * kRun;
  static constexpr int kProductPlane = FifthShares::kParts * kStripRows * kProductPitch + 4;
  static constexpr int kProducts = 3 * kProductPlane;
  // The first pixel's product by the tap of a column.
  FASTALPS_INDEX static int product_at(int tap) { return tap * kProductPlane + 1 - tap; }

  // Shared memory: weights; the even map; the odd map, later the products; the input; biases, see
  // `keep_biases`; the warps' sums.
  static constexpr int kEvenAt = kFragments * kLanes * 8;
  static constexpr int kEvenBytes = kFourth / kChunkChannels * FourthMap::kPlaneBytes;
  static constexpr int kOddAt = kEvenAt + kEvenBytes;
  static constexpr int kThirdBytes = kThird / kChunkChannels * ThirdMap::kPlaneBytes;
  static constexpr int kProductBytes = align_up(kProducts * 4, kChunkBytes);
  static constexpr int kOddBytes = kThirdBytes > kProductBytes ? kThirdBytes : kProductBytes;
  // In the products' place, at last: residuals, and their means along rows.
  static_assert(2 * kSize * kSize * 4 <= kOddBytes);
  static constexpr int kInputAt = kOddAt + kOddBytes;
  static constexpr int kInputBytes = kInputs / kChunkChannels * InputMap::kPlaneBytes;
  static constexpr int kBiasesAt = kInputAt + kInputBytes;
  static constexpr int kSumsAt = kBiasesAt + kBiases * 8;
  static constexpr int kSharedBytes = kSumsAt + kWarps * 4;
};

// A whole network: square images of one channel, the widths of fastalps.models.PRESETS.
template <int kSize, int kC1, int kC2, int kC3, int kLatent, int kD0, int kD1, int kD2, int kD3,
          int kD4, int kD5>
struct Shape {
  static constexpr int kQuarter = divide_up(divide_up(kSize, 2), 2);
  using Encode = EncodeShape<kSize, kC1, kC2>;
  template <int kTiles>
  using LatentOf = LatentShape<kTiles, kQuarter, kC2, kC3, kLatent>;
  template <int kTiles>
  using DenseOf = DenseShape<kTiles, kLatent, kD0, kQuarter * kQuarter * kD2>;
  template <int kTiles>
  using ExpandOf = ExpandShape<kTiles, kQuarter, kD0, kD1, kD2>;
  using Latent = LatentOf<1>;
  using Dense = DenseOf<1>;
  using Expand = ExpandOf<1>;
  using Decode = DecodeShape<kSize, kD2, kD3, kD4, kD5>;
  static constexpr int kPixels = kSize * kSize;

  // Places of the kernels' weights (in fragments of 256 bytes) and biases (in floats).
  static constexpr int kLatentAt = Encode::kFragments;
  static constexpr int kDenseAt = kLatentAt + Latent::kFragments;
  static constexpr int kExpandAt = kDenseAt + Dense::kFragments;
  static constexpr int kDecodeAt = kExpandAt + Expand::kFragments;
  static constexpr int kFragments = kDecodeAt + Decode::kFragments;
  static constexpr int kLatentBias = Encode::kBiases;
  static constexpr int kDenseBias = kLatentBias + Latent::kBiases;
  static constexpr int kExpandBias = kDenseBias + Dense::kBiases;
  static constexpr int kDecodeBias = kExpandBias + Expand::kBiases;
  static constexpr int kBiases = kDecodeBias + Decode::kBiases;

  // Scratch of a patch, in bf16 values: the maps between E and M, later those between M and D (both
  // networks, then both passes).
  static constexpr int kMapValues =
      2 * (Encode::kOutputs > Expand::kOutputs ? Encode::kOutputs : Expand::kOutputs);

  // What every GPU of compute capability 8.0, 9.x and 10.x gives a block: 163 KiB.
  static constexpr int kMostShared = 163 * 1024;
  static_assert(Encode::kSharedBytes <= kMostShared && Latent::kSharedBytes <= kMostShared);
  static_assert(Dense::kSharedBytes <= kMostShared);
  static_assert(Expand::kSharedBytes <= kMostShared && Decode::kSharedBytes <= kMostShared);
  // Those of 9.x and 10.0 give 227 KiB, which is enough for two tiles of these networks; where it
  // is not, M takes one.
};

// The shipped presets, by the numbers that fastalps/fused/packing.py gives them.
template <int kSize>
using Paper = Shape<kSize, 32, 64, 128, 16, 256, 128, 64, 32, 16, 16>;
template <int kSize>
using Fast = Shape<kSize, 16, 32, 64, 16, 96, 64, 32, 16, 8, 8>;
template <int kSize>
using NetworkB = Shape<kSize, 32, 64, 128, 256, 256, 128, 64, 32, 16, 16>;

template <int64_t kNumber>
using Number = std::integral_constant<int64_t, kNumber>;

// Calls body(Number{}, Shape{}) for the shape of that number; returns whether there is one.
#if defined(FASTALPS_FUSED_SHAPE)
// Of a library that was built at run time, there is one: see fastalps/fused/build.py.
template <typename Body>
bool with_numbered_shape(int64_t number, Body&& body) {
  return number == 0 && (body(Number<0>{}, Shape<FASTALPS_FUSED_SHAPE>{}), true);
}
#else
template <typename Body>
bool with_numbered_shape(int64_t number, Body&& body) {
  switch (number) {
    case 0:
      return body(Number<0>{}, Paper<28>{}), true;
    case 1:
      return body(Number<1>{}, Paper<30>{}), true;
    case 2:
      return body(Number<2>{}, Fast<28>{}), true;
    case 3:
      return body(Number<3>{}, Fast<30>{}), true;
    case 4:
      return body(Number<4>{}, NetworkB<28>{}), true;
    case 5:
      return body(Number<5>{}, NetworkB<30>{}), true;
    default:
      return false;
  }
}
#endif

// The same without the number: body(Shape{}).
template <typename Body>
bool with_shape(int64_t number, Body&& body) {
  return with_numbered_shape(number, [&](auto, auto shape) { body(shape); });
}

}  // namespace fastalps::cuda::fused
